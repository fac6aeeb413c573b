"""Cases of the elastic modules that run in the worker pool or in the test's own process."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from dense_features import parts
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from small_parent import FFN_GROUPS, architecture, random_subnet, space_of
from torch import Tensor

from nemo_elastic.mcore.elastic.model import ElasticMambaModel
from nemo_elastic.mcore.elastic.plan import Plan, hard_plan, soft_plan
from nemo_elastic.mcore.elastic.spec import elastic_stack_spec
from nemo_elastic.mcore.kernels.context import own_chunks
from nemo_elastic.mcore.kernels.kind_modules import SLOTS
from nemo_elastic.mcore.kernels.layer_specs import local_stack_spec
from nemo_elastic.mcore.models.build import (
    build_elastic_model,
    load_weights,
    named_global_parameters,
    transformer_config,
    whole_tensors,
)
from nemo_elastic.mcore.runtime.parallel import stage_ends
from nemo_elastic.mcore.versions import layer_pattern
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.dims import DEPTH, KIND_OF_DIM, PER_LAYER_DIMS, WIDTH_DIMS
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

Case = tuple[str, Subnet | None]  # mode and what it runs; "soft" has masks instead of a subnet


def layout_of(arch: Architecture, tp: int = 1) -> ParamLayout:
    return ParamLayout(arch, ffn_groups=FFN_GROUPS, tp_size=tp)


def random_weights(arch: Architecture, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Whole weights with random norms, biases and A, so that no identity holds by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in layout_of(arch).table.items():
        shape = spec.shape({})
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1:
            w = w / shape[-1] ** 0.5
        elif "norm" in name:
            w = 1 + 0.3 * w
        elif name.endswith("A_log"):
            w = 0.5 * w
        weights[name] = w.to(dtype)
    return weights


def tokens(arch: Architecture, seed: int = 1, batch: int = 2, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, arch.vocab_size, (batch, length), generator=generator)


def elastic_model(
    arch: Architecture,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    function: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """This rank's elastic model with the random weights of `seed`; `function`: what a section says beside the sizes."""
    section = {**vars(arch), **(function or {})}
    model = build_elastic_model(section, ffn_groups=FFN_GROUPS, params_dtype=dtype, **more)
    load_weights(model, random_weights(arch, dtype, seed), arch, ffn_groups=FFN_GROUPS)
    return model


def spec_with_a_plain(kind: str) -> ModuleSpec:
    """The elastic stack whose layers of one kind are Megatron's own, as if a new name upstream had missed ours."""
    spec, plain = elastic_stack_spec(), local_stack_spec()
    field, _ = SLOTS[kind]
    setattr(spec.submodules, field, getattr(plain.submodules, field))
    return spec


def refusal_of(pattern: str, plain: str = "") -> str:
    """What building this rank's stage is refused with; empty where it is built."""
    first, last = stage_ends()
    arguments = layer_pattern(pattern) | {"pre_process": first, "post_process": last, "vocab_size": 64}
    spec = spec_with_a_plain(plain) if plain else elastic_stack_spec()
    arch = architecture(pattern)
    try:
        ElasticMambaModel(transformer_config(arch), spec, layout=layout_of(arch), max_sequence_length=64, **arguments)
    except ValueError as error:
        return str(error)
    return ""


def gates(arch: Architecture, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Straight-through scalars of value 1 for every dim, per layer where a dim can be."""
    rows = {n: len(arch.layers_of(KIND_OF_DIM[n])) if n in PER_LAYER_DIMS else 1 for n in WIDTH_DIMS}
    there = {n for n in rows if n not in KIND_OF_DIM or (arch.layers_of(KIND_OF_DIM[n]) and getattr(arch, n))}
    rows = {n: k for n, k in rows.items() if k and n in there}
    return {n: torch.ones(k, dtype=dtype, requires_grad=True) for n, k in {**rows, DEPTH: arch.num_layers}.items()}


def units(arch: Architecture) -> dict[str, int]:
    """Units of one group, per width dim."""
    axes = layout_of(arch).axes
    factors = [f for axis in axes.values() for segment in axis for f in segment.factors if f.dim]
    return {f.dim: f.count for f in factors}


def soft_masks(arch: Architecture, seed: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random masks in (0.2, 1) for every dim and layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: (len(g), units(arch)[n]) for n, g in gates(arch).items() if n != DEPTH} | {DEPTH: (arch.num_layers,)}
    made = {n: 0.2 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    return {n: m.to(dtype).requires_grad_() for n, m in made.items()}


def one_hot_masks(arch: Architecture, subnet: Subnet, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The soft masks that mean exactly `subnet`."""
    found = {}
    for name, count in units(arch).items():
        if name not in gates(arch):
            continue
        row = getattr(subnet, name)
        row, full = row if isinstance(row, tuple) else (row,), getattr(arch, name)
        found[name] = torch.stack([(torch.arange(count) < size * count // full).to(dtype) for size in row])
    found[DEPTH] = torch.tensor([float(i in subnet.layers) for i in range(arch.num_layers)], dtype=dtype)
    return {n: m.requires_grad_() for n, m in found.items()}


def plan_and_values(arch: Architecture, layout: ParamLayout, case: Case) -> tuple[Plan, dict[str, Tensor]]:
    """A plan, and the leaves (gates or soft masks) whose gradients are wanted."""
    mode, subnet = case
    if mode == "soft":
        values = soft_masks(arch)
        return soft_plan(layout, space_of(arch).full_subnet(), values), values
    values = gates(arch)
    return hard_plan(layout, subnet, mode, values), values


def project(logits: Tensor, seed: int = 5) -> Tensor:
    """A scalar that depends on every logit."""
    generator = torch.Generator().manual_seed(seed)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)).sum()


def gradients(model: Any, layout: ParamLayout) -> dict[str, Tensor]:
    """Gradients by canonical name: `grad` plus `main_grad`, zeros where there is none."""
    found: dict[str, Tensor] = {}
    for name, p in named_global_parameters(model, layout):
        parts = [g for g in (p.grad, getattr(p, "main_grad", None)) if g is not None]
        found[name] = sum(parts, torch.zeros_like(p)).detach().clone()
    return found


def run_plan(model: Any, ids: Tensor, plan: Plan | None, layout: ParamLayout) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and parameter gradients of one forward and backward."""
    model.zero_grad(set_to_none=True)
    logits = model(ids, None, None, elastic=plan)
    project(logits).backward()
    return logits.detach().clone(), gradients(model, layout)


# What follows runs on every rank of a pool: a few micro-batches of different subnets through Megatron's schedule.


def micro_batches(arch: Architecture, mamba_num_heads: int = 0) -> list[Case]:
    """Different subnets in flight; masked and soft ones in between (the residual stream then has the full width).

    `mamba_num_heads`: in every layer of every child, where not all sizes are legal.
    """
    space, rng = space_of(arch), random.Random(11)
    full, some = space.full_subnet(), [random_subnet(space, rng, per_layer=True) for _ in range(3)]
    if mamba_num_heads:
        some = [replace(s, mamba_num_heads=(mamba_num_heads,) * len(s.mamba_num_heads)) for s in some]
    few = replace(some[0], layers=(2, 5))  # whole pipeline stages without a layer
    return [("sliced", some[0]), ("masked", some[1]), ("sliced", full), ("sliced", few), ("soft", None)]


def schedule_step(
    *,
    sp: bool = False,
    tied: bool = False,
    ddp: bool = False,
    order: Iterable[int] | None = None,
    feature: str = "",
    pattern: str | None = None,
    one_group: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """One step: losses (last stage), whole gradients of this stage, gate gradients summed over stages.

    Args:
        order: which of `micro_batches` to run, default all.
        feature: one of dense parents (`dense_features`).
        one_group: Mamba layers have one group of 12 heads, children 4 of them.
        more: config fields (recomputation).
    """
    sizes: dict[str, Any] = {"mamba_num_groups": 1} if one_group else {}
    arch, function = parts(feature, pattern, share_embeddings_and_output_weights=tied, **sizes)
    layout = layout_of(arch, parallel_state.get_tensor_model_parallel_world_size())
    model = elastic_model(arch, torch.float64, function=function, sequence_parallel=sp, **more).train()
    cases = micro_batches(arch, 4 if one_group else 0)
    picked = list(range(len(cases)) if order is None else order)
    made = {i: plan_and_values(arch, layout, cases[i]) for i in picked}
    run, config = model, model.config
    if ddp:
        run = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        run.zero_grad_buffer()
    config.finalize_model_grads_func = finalize_model_grads if ddp else None

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        i = next(batches)
        ids, context = tokens(arch, seed=100 + i, length=17), parallel_state.get_context_parallel_group()
        own, labels = (own_chunks(part, context).contiguous() for part in (ids[:, :-1], ids[:, 1:]))
        output = model(own, None, None, labels=labels, elastic=made[i][0])

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            part = losses.sum() / ids[:, 1:].numel()
            whole = part.detach().clone()
            torch.distributed.all_reduce(whole, group=context)
            return part, {"loss": whole}

        return output, mean

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(picked),
        model=[run],
        num_microbatches=len(picked),
        seq_length=16,
        micro_batch_size=2,
        forward_only=False,
    )
    if not ddp:
        finish_gradients(model)
    return {
        "losses": [r["loss"].item() for r in found],
        "gradients": dict(whole_tensors(gradients(model, layout).items(), layout)),
        "gates": {i: summed_over_stages(values) for i, (_, values) in made.items()},
    }


def finish_gradients(model: Any) -> None:
    """What Megatron's `finalize_model_grads` does to `main_grad`, on plain `grad`."""
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        mean_over_context(p.grad)
        if getattr(p, "sequence_parallel", False):
            torch.distributed.all_reduce(p.grad, group=parallel_state.get_tensor_model_parallel_group())
    tied = model.share_embeddings_and_output_weights
    if (
        tied
        and parallel_state.get_pipeline_model_parallel_world_size() > 1
        and (model.pre_process or model.post_process)
    ):
        weight = model.shared_embedding_or_output_weight()
        torch.distributed.all_reduce(weight.grad, group=parallel_state.get_embedding_group())


def summed_over_stages(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of gates: each stage has those of its own layers."""
    found = {}
    for name, value in values.items():
        total = torch.zeros_like(value) if value.grad is None else value.grad.clone()
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        found[name] = mean_over_context(total)
    return found


def mean_over_context(gradient: Tensor) -> Tensor:
    """Over context-parallel ranks, in place: Megatron multiplies the loss of each by their number."""
    torch.distributed.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
    return gradient.div_(parallel_state.get_context_parallel_world_size())


def evaluate_case(sp: bool, vocab_size: int = 64) -> dict[str, Any]:
    """Held-out loss and logits of the whole model and of a subnet, on three batches (an odd number for DP2)."""
    from nemo_elastic.mcore.models.evaluate import heldout_loss, heldout_sums, whole_logits
    from nemo_elastic.space.elastic_space import ElasticSpace

    arch = architecture(vocab_size=vocab_size)
    space = ElasticSpace(architecture=arch, ffn_groups=FFN_GROUPS)
    model = build_elastic_model(arch, ffn_groups=FFN_GROUPS, sequence_parallel=sp)
    load_weights(model, random_weights(arch, torch.float32), arch, ffn_groups=FFN_GROUPS)
    batches = [(tokens(arch, seed), tokens(arch, seed + 100)) for seed in range(3)]
    subnet = space.subnet(hidden_size=32, ffn_hidden_size=32, mamba_num_heads=8, layers=(0, 1, 3, 4, 7))
    groups = [[(2 * batch + row) % 3 for row in range(len(batches[0][0]))] for batch in range(3)]
    found: dict[str, Any] = {"batches": batches, "groups": groups}
    for name, plan in (("full", None), ("cut", hard_plan(model.layout, subnet, "sliced"))):
        logits = [whole_logits(model, ids, plan) for ids, _ in batches]
        found[name] = {"loss": heldout_loss(model, batches, plan), "logits": logits}
        found[name]["sums"] = heldout_sums(model, batches, plan, groups)
    return found
