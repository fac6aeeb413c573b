"""Stage 9: what the router's gates cost a sliced step, compiled functions against eager, and a profile."""

import time
from typing import Any

import torch
from registry import Found, Machine, check, one_process


def step(machine: Machine, *, gated: bool) -> Any:
    """A sliced forward and backward of half the parameters, with straight-through gates or without."""
    one_process()
    import elastic_step
    from stage5_steps import TOKENS, WIDE

    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import build_elastic_model
    from nemo_elastic.space.dims import DEPTH, KIND_OF_DIM, PER_LAYER_DIMS, WIDTH_DIMS
    from nemo_elastic.space.elastic_space import ElasticSpace
    from nemo_elastic.space.layout import ParamLayout

    arch, length = (elastic_step.QUICK, 64) if machine.tiny else (WIDE, TOKENS)
    groups, dtype = elastic_step.FFN_GROUPS, torch.bfloat16 if machine.is_cuda else torch.float32
    layout = ParamLayout(arch, ffn_groups=groups)
    subnet = elastic_step.subnet_for(ElasticSpace(architecture=arch, ffn_groups=groups), 0.5)
    model = build_elastic_model(arch, ffn_groups=groups, params_dtype=dtype).to(machine.device)
    ids = torch.randint(0, arch.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(machine.device)
    rows = {n: len(arch.layers_of(KIND_OF_DIM[n])) if n in PER_LAYER_DIMS else 1 for n in WIDTH_DIMS}
    rows[DEPTH] = arch.num_layers

    def run() -> None:
        gates = {n: torch.ones(k, device=machine.device, requires_grad=True) for n, k in rows.items()}
        plan = hard_plan(layout, subnet, "sliced", gates if gated else None)
        model(ids, None, None, labels=ids.roll(-1, 1), elastic=plan).mean().backward()
        model.zero_grad(set_to_none=True)

    return run


@check(stage=9, seconds=30, predicted={"gated_over_frozen": (0.98, 1.05)})
def phases(machine: Machine) -> Found:
    """A sliced step with the router's gates (hard phase) against one without (frozen)"""
    frozen = machine.milliseconds(step(machine, gated=False), 3)
    gated = machine.milliseconds(step(machine, gated=True), 3)
    return Found({"frozen_ms": frozen, "gated_ms": gated, "gated_over_frozen": gated / frozen})


@check(stage=9, seconds=40, predicted={"eager_over_compiled": (0.95, 1.15)})
def compiled(machine: Machine) -> Found:
    """Megatron's compiled functions against eager ones: first step and later ones"""
    found = {}
    for name, stance in (("compiled", "default"), ("eager", "force_eager")):
        run = step(machine, gated=False)
        with torch.compiler.set_stance(stance if machine.is_cuda else "force_eager"):
            begin = time.perf_counter()
            run()
            if machine.is_cuda:
                torch.cuda.synchronize()
            found[f"{name}_first_ms"] = 1e3 * (time.perf_counter() - begin)
            found[f"{name}_ms"] = machine.milliseconds(run, 3)
    found["eager_over_compiled"] = found["eager_ms"] / found["compiled_ms"]
    return Found(found, stand_in=not machine.is_cuda)


@check(stage=9, seconds=30)
def profile(machine: Machine) -> Found:
    """The dozen kernels that take most of a sliced step"""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    run = step(machine, gated=False)
    run()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]
    with profiled(activities=kinds) as recorded:
        run()
        if machine.is_cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if machine.is_cuda else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -getattr(row, key))[:12]
    whole = sum(getattr(row, key) for row in recorded.key_averages()) or 1
    return Found({"kernels": [f"{row.key[:60]}: {getattr(row, key) / whole:.1%}, {row.count} calls" for row in rows]})
