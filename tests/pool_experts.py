"""Ranking of a parent with experts, in the worker pool or in the test's own process."""

from typing import Any

import torch
from expert_features import parts
from megatron.core import dist_checkpointing
from pool_elastic import layout_of, random_weights, tokens
from small_parent import FFN_GROUPS
from torch import Tensor

from nemo_elastic.importance.ranking import random_orders
from nemo_elastic.mcore.models.build import (
    build_plain_model,
    load_weights,
    named_global_parameters,
    of_this_rank,
    whole_tensors,
)
from nemo_elastic.mcore.ranking.collect import collect_widths
from nemo_elastic.mcore.ranking.sort_live import sort_model
from nemo_elastic.mcore.ranking.stack_forward import Groups
from nemo_elastic.space.dims import present_dims

FP64 = torch.float64
SAMPLES = 4


def plain(feature: str, sp: bool = False) -> Any:
    """This rank's plain model with random weights."""
    arch, function = parts(feature)
    model = build_plain_model({**vars(arch), **function}, params_dtype=FP64, sequence_parallel=sp)
    load_weights(model, random_weights(arch, FP64), arch, ffn_groups=FFN_GROUPS)
    return model


def scores(feature: str, sp: bool = False) -> dict[str, dict[int, Tensor]]:
    """Of four samples, dealt to the replicas."""
    arch, _ = parts(feature)
    replicas = Groups.from_megatron().dp
    batches = [tokens(arch, seed) for seed in range(SAMPLES)][replicas.rank() :: replicas.size()]
    return collect_widths(plain(feature, sp), batches, layout_of(arch))


def sorted_weights(feature: str, sp: bool = False) -> dict[str, Tensor]:
    """Whole weights of this stage, put in a random order in place."""
    arch, _ = parts(feature)
    orders = random_orders(layout_of(arch), present_dims(arch), torch.Generator().manual_seed(3))
    model = plain(feature, sp)
    sort_model(model, layout_of(arch), orders)
    local = of_this_rank(arch, FFN_GROUPS)
    return {n: w.detach() for n, w in whole_tensors(named_global_parameters(model, local), local)}


def save(folder: str, feature: str) -> None:
    """The plain model, by stock Megatron."""
    from pool_checkpoint import _save

    _save(plain(feature).sharded_state_dict(prefix="module."), folder)


def load(folder: str, feature: str) -> dict[str, Tensor]:
    """Whole weights of this stage of a model that stock Megatron filled from a checkpoint of any layout."""
    arch, _ = parts(feature)
    model = plain(feature)
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), folder)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    local = of_this_rank(arch, FFN_GROUPS)
    return {n: w.detach() for n, w in whole_tensors(named_global_parameters(model, local), local)}
