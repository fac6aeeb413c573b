"""Whole training steps of a small family (students, router, teacher) in the worker pool or the test's own process."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import expert_features
import pytest
import torch
from dense_features import FAMILIES, FEATURES
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from pool_elastic import FFN_GROUPS, random_weights, tokens
from small_parent import PATTERN, SMALL
from torch import Tensor

from nemo_elastic.config import load_values
from nemo_elastic.config.sections import RunConfig, StageConfig
from nemo_elastic.family import family_of
from nemo_elastic.mcore.elastic.spec import elastic_stack_spec
from nemo_elastic.mcore.family.family_model import FamilyModel
from nemo_elastic.mcore.family.gradients import gradient_norms, hand_norm
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.mcore.family.teacher_cache import TeacherCache
from nemo_elastic.mcore.kernels.context import own_chunks
from nemo_elastic.mcore.models.build import (
    build_plain_model,
    load_weights,
    named_global_parameters,
    of_this_rank,
    whole_tensors,
)
from nemo_elastic.mcore.models.evaluate import heldout_loss
from nemo_elastic.mcore.runtime.parallel import broadcast_from_last_stage, data_parallel_rank_and_size, stage_ends
from nemo_elastic.mcore.versions import build_optimizer, layer_pattern
from nemo_elastic.nemo.plain.optimizer import apply_multipliers
from nemo_elastic.nemo.run.elastic_model import ElasticLossReduction
from nemo_elastic.nemo.run.guard import FiniteGuard
from nemo_elastic.nemo.run.step_record import hard_subnets, step_subnets
from nemo_elastic.nemo.run.train import decays_not, is_router
from nemo_elastic.router.model import Router
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.space.layout import ParamLayout

MICRO_BATCHES = 4
RANKING = (6, 3, 0, 2, 7, 5, 1, 4)
DIMS = {
    "hidden_size": {"choices": [1.0, 0.75]},
    "ffn_hidden_size": {"choices": [1.0, 0.5, 0.25], "per_layer": True},
    "mamba_num_heads": {"choices": [12, 8]},
    "num_attention_heads": {"choices": [12, 8, 4]},
    "num_layers": {"choices": [8, 7, 6, 5]},
}


def run_config(*, tied: bool = False, vocab_size: int = 64, feature: str = "", **distill: Any) -> RunConfig:
    """`feature`: one of dense parents (`dense_features`), a family, or experts (`expert_features`)."""
    sizes = SMALL | {"vocab_size": vocab_size} | (FEATURES | FAMILIES).get(feature, {})
    pattern, dims = sizes.get("hybrid_override_pattern", PATTERN), DIMS
    if feature in expert_features.FEATURES:
        expert_features.skip_without_slot()
        sizes |= expert_features.SIZES | expert_features.FEATURES[feature]
        pattern, dims = expert_features.PATTERN, DIMS | expert_features.DIMS
    return load_values(
        {
            "model": sizes | {"hybrid_override_pattern": pattern, "share_embeddings_and_output_weights": tied},
            "elastic": {
                "ffn_groups": FFN_GROUPS,
                "dims": dims,
                "budgets": {"full": 1.0, "large": 0.75, "small": 0.5},
            },
            "router": {"shapes": "learned", "hidden_size": 16, "init_std": 0.5},
            "distill": {"ce_weight": 0.1, **distill},
            "train": {"seed": 7, "micro_batch_size": 2},
        }
    )


def build(
    run: RunConfig,
    dtype: torch.dtype,
    ranking: tuple[int, ...] = RANKING,
    *,
    load: bool = True,
    sharing: int | None = None,
    teacher_seed: int = 1,
    **more: Any,
) -> tuple[FamilyModel, Planner]:
    """Model and planner of a run; `load`: with the random weights of the small parent.

    `sharing`: of a planner, where it is not the expert-parallel size. `teacher_seed`: 0 has the model's own weights.
    """
    family = family_of(run, ranking)
    arch, groups = family.architecture, family.space.groups
    layout = of_this_rank(arch, groups)
    teacher = build_plain_model(run.model, params_dtype=dtype, **more)  # its configuration is the family's, too
    teacher.config.has_cond_embedder = True  # as `ElasticSSMConfig` says
    first, last = stage_ends()
    model = FamilyModel(
        teacher.config,
        elastic_stack_spec(),
        layout=layout,
        vocab_size=layout.padded_vocab_size,
        max_sequence_length=64,
        **layer_pattern(arch.hybrid_override_pattern),
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
        pre_process=first,
        post_process=last,
    )
    for module, seed in ((model, 0), (teacher, teacher_seed)) if load else ():
        load_weights(module, random_weights(arch, dtype, seed), arch, ffn_groups=groups)
        module.to(dtype)
    router = Router(family.space, family.learned, run.router, seed=3)
    model.attach(router, teacher if run.distill.builds_parent else None, self_taught=run.distill.self_taught)
    sharing = sharing or max(1, layout.ep_size // parallel_state.get_context_parallel_world_size())
    timeline = Timeline(1, 3, 5, 6)
    planner = Planner(family, run.router, layout, timeline=timeline, seed=run.train.seed, sharing=sharing)
    return model, planner


def train_steps(
    *,
    steps: tuple[int, ...] = (1, 3),
    optimize: bool = False,
    distributed_optimizer: bool = False,
    dtype: torch.dtype = torch.float64,
    sp: bool = False,
    tied: bool = False,
    vocab_size: int = 64,
    feature: str = "",
    distill: dict[str, Any] | None = None,
    half: int | None = None,
    cache: str | None = None,
    bias_rate: float | None = None,
    only: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Steps of the run as `ElasticCallback` and NeMo run them: per step the losses, whole gradients and choices.

    Args:
        steps: numbers of the run's steps: 0 warm-up, 1 and 2 soft, 3 and 4 hard, 5 frozen.
        half: only the first or the second of a micro-batch's students.
        cache: folder of the teacher's states, filled first where it is not whole.
        bias_rate: count the tokens of experts, and move their bias by so much a step.
        only: `full` or `children`: the others' shares of the loss are 0.
        optimize: take Adam steps in between (else the weights stay).
    """
    run = run_config(tied=tied, vocab_size=vocab_size, feature=feature, **(distill or {}))
    model, planner = build(run, dtype, sequence_parallel=sp, variable_seq_lengths=True,
                           moe_token_dispatcher_type="alltoall", pipeline_dtype=dtype, **more)  # fmt: skip
    config = model.config
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer), model
    )
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = _optimizer(wrapped, distributed_optimizer) if optimize else None
    states = None if cache is None else _filled(cache, model, dtype)
    reduction = ElasticLossReduction(run.distill, tuple(run.elastic.budgets), planner.loss)
    if bias_rate is not None:
        model.count_experts(list(run.elastic.budgets))
    found: dict[str, Any] = {"steps": []}
    for step in steps:
        wrapped.zero_grad_buffer()
        if optimizer is not None:
            optimizer.zero_grad()
        state = planner.begin_step(model.policy, step)
        outputs = _schedule(run, model, wrapped, planner, state, reduction, half, states, only)
        losses = _numbers(reduction, outputs)
        record = {
            "losses": broadcast_from_last_stage(losses),
            "seen": sorted(reduction.stats),  # on the last stage
            "errors": {n: c.argmax_error for n, c in state.chosen.items()},
        }
        if not distributed_optimizer:
            record["gradients"] = _gradients(model, planner.layout)
            record["router"] = {n: p.main_grad.clone() for n, p in model.policy.named_parameters()}
        if optimizer is not None:
            optimizer.prepare_grads()
            measured, own = optimizer.get_grad_norm(), math.hypot(*gradient_norms(wrapped, optimizer).tolist())
            assert math.isclose(own, measured, rel_tol=1e-5), (own, measured)
            hand_norm(optimizer, own)
            record["grad_norm"] = float(optimizer.step()[1])
        planner.end_step(state)
        if model.load is not None:
            model.load.end_step(bias_rate, hard_subnets(planner, state))
            record["load"], record["ran"] = model.load.total.clone(), step_subnets(planner, state)
        found["steps"].append(record)
    last = planner.choices(model.policy)
    found["subnets"] = {n: planner.subnet_of_choice(n, c).to_dict() for n, c in last.items()}
    found["probabilities"] = {
        name: {
            d: p.detach().clone()
            for d, p in model.policy(model.policy.budget_vector(name), tau=1.0, scale=1.0).probabilities.items()
        }
        for name in planner.learned
    }
    found["prices"] = planner.state_dict()["steering"]
    found["weights"] = dict(whole_tensors(named_global_parameters(model, planner.layout), planner.layout))
    found["router_weights"] = {n: p.detach().clone() for n, p in model.policy.named_parameters()}
    return found


def _filled(folder: str, model: FamilyModel, dtype: torch.dtype) -> TeacherCache:
    arch, stages = model.layout.architecture, (StageConfig(steps=6, seq_length=16, global_batch_size=8),)
    sizes = {"micro_batch_size": 4, "hidden_size": arch.hidden_size, "dtype": dtype}
    cache = TeacherCache(Path(folder), stages, **sizes, identity={"text": 1})

    def read_tokens(sample: int, seq_length: int) -> Tensor:
        step, rest = divmod(sample, 8)
        return tokens(arch, seed=1000 * step + rest // 2, length=seq_length + 1)[rest % 2, :-1]

    if not cache.is_whole:
        cache.fill(model.teacher, read_tokens)
    model.retire_teacher()
    return cache


def _schedule(
    run: RunConfig,
    model: Any,
    wrapped: Any,
    planner: Planner,
    state: Any,
    reduction: Any,
    half: int | None,
    states: Any,
    only: str,
) -> list[Any]:
    rank, size = data_parallel_rank_and_size()
    arch = planner.family.architecture
    shares, context = {"full": 0.2, "large": 0.4, "small": 0.4}, parallel_state.get_context_parallel_group()

    def batches() -> Iterator[dict[str, Any]]:
        for index in range(rank, MICRO_BATCHES, size):
            ids = tokens(arch, seed=1000 * state.step + index, length=17)
            budgets = planner.budgets_of(shares, state.step, index, run.distill.budgets_per_batch)
            planned = planner.micro_batch(model.policy, state, budgets, index)
            if only:
                planned = tuple(
                    p if (p.budget == "full") == (only == "full") else replace(p, weight=0.0) for p in planned
                )
            mask = torch.ones(2, 16)
            mask[index % 2, : 4 + index] = 0.0
            yield {
                "tokens": own_chunks(ids[:, :-1], context),
                "labels": own_chunks(ids[:, 1:].contiguous(), context),
                "loss_mask": own_chunks(mask, context),
                "teacher": states and partial(states.read, state.step, 8 * state.step + 2 * index, 2),
                "elastic": planned if half is None else planned[half : half + 1],
            }

    def forward_step(iterator: Any, module: Any) -> tuple[Any, Any]:
        batch = next(iterator)
        plans = [p.plan for p in batch["elastic"]]
        budgets = [p.budget for p in batch["elastic"]]
        out = module(batch["tokens"], None, None, elastic=plans, distill=True, cached=batch["teacher"], budgets=budgets)
        return out, lambda heads: reduction.forward(batch, heads)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(),
        model=[wrapped],
        num_microbatches=MICRO_BATCHES // size,
        seq_length=16,
        micro_batch_size=2,
        forward_only=False,
    )


def _numbers(reduction: ElasticLossReduction, outputs: list[Any]) -> list[float]:
    """Mean loss, then kd, ce, hidden, tokens and budget loss of every budget seen."""
    if not outputs:
        return []
    total = float(reduction.reduce(outputs))
    rows = [[s.kd, s.ce, s.hidden, float(s.tokens), s.budget_loss] for _, s in sorted(reduction.stats.items())]
    return [total, *(v for row in rows for v in row)]


def _gradients(model: FamilyModel, layout: ParamLayout) -> dict[str, Tensor]:
    own = ((name, p) for name, p in named_global_parameters(model, layout) if p.requires_grad)
    named = ((name, p.main_grad) for name, p in own)
    return {name: g.clone() for name, g in whole_tensors(named, layout)}


def _optimizer(wrapped: Any, distributed: bool) -> Any:
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=distributed
    )
    return build_optimizer(config, [wrapped], no_weight_decay_cond=decays_not, scale_lr_cond=is_router, lr_mult=10.0)


def _wrapped(distributed: bool = False) -> DistributedDataParallel:
    model, _ = build(run_config(), torch.float32)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, settings, model)


def guarded_step(distributed: bool) -> dict[str, Any]:
    """A step behind the guard, on random gradients: its norm, Megatron's own, and how often Megatron measured."""
    from megatron.core.optimizer import optimizer as upstream

    wrapped, calls = _wrapped(distributed), []
    optimizer, generator = _optimizer(wrapped, distributed), torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.prepare_grads()
    found: dict[str, Any] = {"megatron": optimizer.get_grad_norm(), "steps": []}
    guard, measure = FiniteGuard(), upstream.get_grad_norm_fp32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "get_grad_norm_fp32", lambda *a, **k: calls.append(1) or measure(*a, **k))
        for guarded in (True, False):
            if guarded:
                module, own = SimpleNamespace(module=wrapped), SimpleNamespace(mcore_optimizer=optimizer)
                guard.on_before_optimizer_step(SimpleNamespace(global_step=0), module, own)
            found["steps"].append((float(optimizer.step()[1]), len(calls)))
    found["parts"] = tuple(guard.norms)
    return found


def parameter_dimensions() -> dict[str, int]:
    """Dimensions of every parameter that is trained."""
    return {name: p.dim() for name, p in _wrapped().named_parameters() if p.requires_grad}


def optimizer_groups(distributed: bool) -> list[dict[str, Any]]:
    """The groups of the family's optimizer as the run's has them, each with the `names` of its parameters."""
    wrapped = _wrapped(distributed)
    optimizer = _optimizer(wrapped, distributed)
    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    groups = [{**group, "names": []} for group in optimizer.param_groups]
    for group in groups:
        apply_multipliers(group)
    for name, parameter in wrapped.named_parameters():
        for place in range(len(groups)):
            if _holds(parts[0], place, parameter):
                groups[place]["names"].append(name)
    return groups


def _holds(optimizer: Any, place: int, parameter: Tensor) -> bool:
    shards = getattr(optimizer, "model_param_group_index_map", None)  # a distributed optimizer's groups hold shards
    if shards is not None:
        return shards[parameter][0] == place
    return any(p is parameter for p in optimizer.param_groups[place]["params"])


def evaluated_twice() -> list[dict[str, Any]]:
    """Held-out losses of what a router chooses in every phase, two times, with other noise in between."""
    run = run_config()
    model, planner = build(run, torch.float32)
    batches = [(tokens(model.layout.architecture, s), tokens(model.layout.architecture, s + 100)) for s in range(2)]
    planner.begin_step(model.policy, 5)  # pins the choices, for the frozen phase
    found = []
    for _ in range(2):
        torch.rand(7)
        subnets = {step: planner.current_subnets(model.policy, step) for step in (0, 1, 3, 5)}
        losses = {
            step: {name: heldout_loss(model, batches, planner.plan_of(subnet)) for name, subnet in chosen.items()}
            for step, chosen in subnets.items()
        }
        found.append({"subnets": subnets, "losses": losses})
    return found


def pinned_and_released() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a frozen phase at step 0 would extract, and the pins after a step that is not frozen any more."""
    model, planner = build(run_config(), torch.float32)
    planner.timeline = Timeline(0, 0, 0, 6)
    found = planner.current_subnets(model.policy, 0)
    planner.begin_step(model.policy, 0)
    assert planner.state.frozen == {name: found[name] for name in planner.learned}
    planner.timeline = Timeline(0, 0, 12, 20)
    planner.begin_step(model.policy, 6)
    return found, dict(planner.state.frozen)
