"""What expert-parallel ranks compute, in the worker pool, and the same in the test's own process.

Every data-parallel rank has other tokens. Logits are weighed by random numbers, in fp64 throughout, so that nothing
but the order of sums differs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from expert_features import parts
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from pool_elastic import gates, gradients, one_hot_masks, soft_masks, summed_over_stages, tokens
from pool_elastic import random_weights as weights_of
from small_parent import FFN_GROUPS, space_of
from torch import Tensor

from nemo_elastic.config.sections import StageConfig
from nemo_elastic.kinds.axis import Groups
from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
from nemo_elastic.mcore.family.teacher_cache import TeacherCache
from nemo_elastic.mcore.models.build import (
    build_elastic_model,
    build_plain_model,
    load_weights,
    of_this_rank,
    whole_tensors,
)
from nemo_elastic.mcore.models.evaluate import heldout_loss
from nemo_elastic.space.elastic_space import ElasticSpace

FP64 = torch.float64
CUTS: dict[str, dict[str, Any]] = {
    "per_layer": {"num_moe_experts": (4, 8, 4), "moe_ffn_hidden_size": (16, 4, 12), "hidden_size": 36},
    "dropped": {"hidden_size": 36, "num_moe_experts": 4, "moe_ffn_hidden_size": 12, "layers": (0, 2, 3, 5)},
}
MODES = {  # of each micro-batch: how it runs, and what
    "masked": ("masked", "per_layer"),
    "sliced": ("sliced", "per_layer"),
    "few": ("sliced", "dropped"),
    "soft": ("soft", ""),
    "one_hot": ("soft", "per_layer"),
    "plain": ("plain", ""),
}


def weights(arch: Any, groups: int) -> dict[str, Tensor]:
    """Random, with a bias that favours what a child drops: the second half of every group."""
    found = weights_of(arch, FP64)
    for layer in arch.layers_of("E"):
        bias = found.get(f"decoder.layers.{layer}.mlp.router.expert_bias")
        if bias is not None:
            bias.view(groups, -1)[:, arch.num_moe_experts // groups // 2 :] += 0.5
    return found


def step(
    feature: str, modes: tuple[str, ...], *, replicas: int | None = None, groups: int = FFN_GROUPS, sp: bool = False,
    plain: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """One step of a micro-batch a mode: losses, whole gradients of this stage, gradients of gates and masks.

    Args:
        replicas: run the tokens of so many data-parallel ranks here, one after the other.
        plain: the plain model; `modes` are as many micro-batches.
    """
    arch, function = parts(feature)
    section, own = {**vars(arch), **function}, Groups(FFN_GROUPS, groups)
    settings = {"params_dtype": FP64, "sequence_parallel": sp, **more}
    model = build_plain_model(section, **settings) if plain else (
        build_elastic_model(section, ffn_groups=own, **settings))  # fmt: skip
    model.to(FP64)  # Mamba's A, D and dt_bias, too
    load_weights(model, weights(arch, groups), arch, ffn_groups=own)
    layout, config = of_this_rank(arch, own), model.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model.train())
    wrapped.zero_grad_buffer()
    config.finalize_model_grads_func = finalize_model_grads
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    seen = range(replicas) if replicas else [rank]
    assert not replicas or size == 1
    values = {name: {} if plain else _values(arch, name, groups) for name in modes}
    space = ElasticSpace(architecture=arch, ffn_groups=FFN_GROUPS, expert_groups=groups)
    plans = {name: _plan(space, layout, name, values[name]) for name in modes}
    tp, part = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        replica, number, name = next(batches)
        ids = tokens(arch, seed=100 + 10 * number + replica)
        out = model(ids, None, None, **({} if plain else {"elastic": plans[name]}))

        def loss(logits: Tensor) -> tuple[Tensor, dict]:
            generator = torch.Generator().manual_seed(5 + number)
            weigh = torch.randn(2, 16, arch.vocab_size, generator=generator, dtype=FP64).chunk(tp, dim=-1)[part]
            found = (logits * weigh).sum()
            return found, {"loss": found.detach().clone()}

        return out, loss

    batches = [(replica, number, name) for number, name in enumerate(modes) for replica in seen]
    found = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[wrapped], num_microbatches=len(batches),
        seq_length=16, micro_batch_size=2, forward_only=False,
    )  # fmt: skip
    losses = torch.stack([r["loss"] for r in found]) if found else torch.zeros(len(batches), dtype=FP64)
    for group in (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        torch.distributed.all_reduce(losses, group=group)
    return {
        "rank": rank,
        "losses": losses.view(len(modes), -1),
        "gradients": dict(whole_tensors(gradients(model, layout).items(), layout)),
        "values": {name: _averaged(summed_over_stages(found)) for name, found in values.items()},
    }


def without_gradients(folder: str, sp: bool = False) -> tuple[float, float, Tensor]:
    """Held-out losses of parent and subnet on three batches, an odd number, and three batches of a teacher's states."""
    arch, function = parts("nemotron")
    section, settings = {**vars(arch), **function}, {"sequence_parallel": sp}
    student, teacher = build_elastic_model(section, ffn_groups=FFN_GROUPS, **settings), build_plain_model(
        section, **settings)  # fmt: skip
    for model in (student, teacher):
        load_weights(model, weights(arch, FFN_GROUPS), arch, ffn_groups=FFN_GROUPS)
    batches = [(tokens(arch, seed), tokens(arch, seed + 100)) for seed in range(3)]
    subnet = space_of(arch).subnet(**CUTS["dropped"])
    losses = [heldout_loss(student, batches, plan) for plan in (None, hard_plan(student.layout, subnet, "sliced"))]
    sizes = {"micro_batch_size": 2, "hidden_size": arch.hidden_size, "dtype": torch.float32}
    stages = (StageConfig(steps=3, seq_length=16, global_batch_size=2),)
    cache = TeacherCache(Path(folder), stages, **sizes, identity={})
    cache.fill(teacher, lambda sample, length: tokens(arch, sample, batch=1, length=length)[0])
    return *losses, cache.read(0, 0, 6).clone()


def _averaged(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    group = parallel_state.get_data_parallel_group()
    for value in found.values():
        torch.distributed.all_reduce(value, group=group)
    return {name: value / group.size() for name, value in found.items()}


def _values(arch: Any, name: str, groups: int) -> dict[str, Tensor]:
    mode, cut = MODES[name]
    if mode == "plain" or (mode == "soft" and groups != FFN_GROUPS):  # the masks here are of FFN_GROUPS
        return {}
    if mode != "soft":
        return gates(arch)
    return one_hot_masks(arch, space_of(arch).subnet(**CUTS[cut])) if cut else soft_masks(arch)


def _plan(space: ElasticSpace, layout: Any, name: str, values: dict[str, Tensor]) -> Any:
    mode, cut = MODES[name]
    if mode == "plain" or not values:
        return None
    if mode == "soft":
        return soft_plan(layout, space.full_subnet(), values)
    return hard_plan(layout, space.subnet(**CUTS[cut]), mode, values)
