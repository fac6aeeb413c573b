"""`plan --gpus`: the layouts of a run over N GPUs that fit their memory, fastest first. Estimated; pure; no torch.

    layout      TP x PP x CP x DP = N, EP of CP x DP where there are experts, a micro-batch size, a recomputation: all
                that the run's own rules allow
    memory      of the GPU that has most: held + max over stages of the curriculum, pipeline stages and what runs of
                (saved x in flight + hand-over + max(head, one layer at work)) + report.gpu.reserve_gb
    step        `cost.roofline`, mean over the phases of the router and the budgets that a stage draws
    days        sum over stages of steps x step

A micro-batch of k budgets keeps what its k largest ones keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from ..config.sections import AUTO, RunConfig
from ..cost.activation_memory import hand_over_bytes, head_bytes, saved_bytes, working_bytes
from ..cost.gpu_layout import GpuLayout, Running
from ..cost.held_memory import held_bytes
from ..cost.roofline import Seconds, hand_over_seconds, student_seconds, teacher_seconds, update_seconds
from ..family import Family
from ..plan.context import chunk_step, share_experts, shares_heads
from .gpu_work import Share, Work, rotary_percent
from .training_cost import teacher_forwards

MICRO_BATCHES = (1, 2, 4, 8)  # sizes that are tried
RECOMPUTES = (None, "selective", "full")
CONTEXT = (1, 2, 4, 8)  # sizes that are tried
CHUNK_TOKENS = 2048  # of the fused loss on a GPU, where distill.chunk_tokens is auto
BYTES_PER_GB = 1e9
DAY = 86400


def layouts(work: Work, gpus: int, memory_gb: float, *, contexts: Sequence[int] = CONTEXT) -> dict[str, Any]:
    """`layouts` that fit, fastest first, and beside them the leanest one of all (`leanest`), fit or not.

    Args:
        memory_gb: of one GPU, 1e9 bytes.
        contexts: context-parallel sizes that are tried.
    """
    found, leanest = [], None
    for how in candidates(work, gpus, contexts):
        memory = memory_bytes(work, how)
        if leanest is None or memory["total"] < leanest[1]["total"]:
            leanest = (how, memory)
        if memory["total"] <= memory_gb * BYTES_PER_GB:
            found.append(described(work, how, memory))
    found.sort(key=lambda row: (row["days"], row["memory_gb"]))
    least = None if leanest is None else sizes_of(leanest[0]) | {"memory_gb": leanest[1]["total"] / BYTES_PER_GB}
    return {
        **asdict(work.run.report.gpu),
        "count": gpus,
        "memory_gb": memory_gb,
        "layouts": found,
        "leanest": least,
    }


def filled(work: Work, gpus: int, reach: int = 64) -> list[int]:
    """The nearest counts of GPUs below and above `gpus`, at most `reach` away, that some layout fills."""
    ways = (range(gpus - 1, max(0, gpus - reach), -1), range(gpus + 1, gpus + reach))
    found = (next((n for n in way if next(candidates(work, n), None)), None) for way in ways)
    return [n for n in found if n is not None]


def candidates(work: Work, gpus: int, contexts: Sequence[int] = CONTEXT) -> Iterator[GpuLayout]:
    """Every layout that the parent's sizes, the curriculum's batches and lengths allow; tensor parallel in a node."""
    run, arch, stages = work.run, work.family.architecture, work.run.train.stages
    element = 4 if run.train.precision == "32" else 2
    for tp, pp, cp in product(range(1, run.report.gpu.node_gpus + 1), _divisors(arch.num_layers), contexts):
        if gpus % (tp * pp * cp) or not work.table(tp) or any(s.seq_length % chunk_step(tp, cp) for s in stages):
            continue
        if cp > 1 and not shares_heads(work.family, tp, cp):
            continue
        dp = gpus // (tp * pp * cp)
        experts = [ep for ep in _divisors(dp * cp) if share_experts(cp, ep) and work.table(tp, ep)]
        for micro, recompute, ep in product(MICRO_BATCHES, RECOMPUTES, experts):
            if any(stage.global_batch_size % (dp * micro) for stage in stages):
                continue
            yield GpuLayout(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                data_parallel_size=dp,
                sequence_parallel=tp > 1,
                micro_batch_size=micro,
                recompute_granularity=recompute,
                use_distributed_optimizer=_distributed(run, element),
                element=element,
                rotary_percent=rotary_percent(run.model),
            )


def memory_bytes(work: Work, how: GpuLayout) -> dict[str, float]:
    """Bytes by what they are on the GPU that has most, and which stage of the curriculum asks for them."""
    run, layout, worst = work.run, work.table_of(how), {"total": -1.0}
    for stage in range(how.pipeline_model_parallel_size):
        if 1 < stage < how.pipeline_model_parallel_size - 1 and _as_before(work.family, how, stage):
            continue  # fewer in flight than the stage before it, and the same layers
        held = held_bytes(
            layout,
            how,
            stage,
            router=work.router,
            teacher=run.distill.builds_parent,
            cached=bool(run.distill.teacher_cache),
        )
        for index, phases in enumerate(work.stages):
            for _, _, row in phases:
                moment = _moment(work, how, stage, index, row)
                total = {**held, **moment, "reserve": run.report.gpu.reserve_gb * BYTES_PER_GB}
                total["total"] = sum(total.values())
                if total["total"] > worst["total"]:
                    worst = total | {"stage": index, "pipeline_stage": stage}
    return worst


def _moment(work: Work, how: GpuLayout, stage: int, index: int, row: Sequence[Share]) -> dict[str, float]:
    """What the micro-batches in flight keep, and the highest moment on the way."""
    run, layout = work.run, work.table_of(how)
    length, distill = run.train.stages[index].seq_length, run.distill
    micro_batches = work.micro_batches(how, index)
    students = list(dict.fromkeys(share.running for share in row))
    kept = {r: saved_bytes(layout, how, r, stage, length, how.recompute_granularity) for r in students}
    largest = [share.running for share in sorted(row, key=lambda share: -kept[share.running])]
    full = Running(subnet=work.family.space.full_subnet())
    head = 0.0
    if how.is_last(stage):
        chunk = CHUNK_TOKENS if distill.chunk_tokens == AUTO else int(distill.chunk_tokens)
        fused, text_alone = distill.fuse_output_layer, distill.self_taught and not distill.teacher_cache
        head = max(
            head_bytes(layout, how, r, length, chunk_tokens=chunk, fused=fused,
                       teacher=distill.needs_teacher and not (text_alone and r == full))
            for r in students
        )  # fmt: skip
    working = max(working_bytes(layout, how, r, stage, length) for r in students)

    def carried(running: Sequence[Running], *, teacher: bool) -> dict[str, float]:
        """Of micro-batches with these students."""
        handed = how.pipeline_model_parallel_size > 1
        return {
            "activations": sum(kept[r] for r in running) * how.in_flight(stage, micro_batches),
            "hand_over": hand_over_bytes(layout, how, running, stage, length, micro_batches, teacher=teacher)
            if handed
            else 0.0,
        }

    each = largest[: distill.budgets_per_batch]
    if distill.self_taught:  # the whole network is a student, or has the teacher's lane
        ways = [carried(each, teacher=full not in each)]
        if teacher_forwards(run, work.family, run.train.stages[index]):
            ways.append(carried([r for r in largest if r != full][: distill.budgets_per_batch], teacher=True))
    else:
        ways = [carried(each, teacher=distill.needs_teacher and not distill.teacher_cache)]
    return {**max(ways, key=lambda way: sum(way.values())), "at_work": max(head, working)}


def stage_seconds(work: Work, how: GpuLayout, index: int) -> dict[str, Any]:
    """Seconds of a step of stage `index` of the curriculum, and what they are made of."""
    run, layout, machine = work.run, work.table_of(how), work.run.report.gpu
    arch, full = work.family.architecture, Running(subnet=work.family.space.full_subnet())
    stages, length = range(how.pipeline_model_parallel_size), run.train.stages[index].seq_length
    forwards = teacher_forwards(run, work.family, run.train.stages[index])
    micro_batches = work.micro_batches(how, index)
    each = {stage: Seconds() for stage in stages}
    width = 0.0
    for _, weight, row in work.stages[index]:
        for share, stage in product(row, stages):
            seconds = student_seconds(layout, how, machine, share.running, stage, length)
            each[stage] += seconds.times(weight * share.per_micro_batch)
        width += sum(weight * s.per_micro_batch * s.running.hidden_size(arch) for s in row)
    if run.distill.needs_teacher:
        for stage in stages:
            for cached, share in ((False, forwards), (True, 1 - forwards)):
                seconds = teacher_seconds(layout, how, machine, full, stage, length, cached=cached)
                each[stage] += seconds.times(share)
        width += forwards * arch.hidden_size
    slowest = max(each.values(), key=lambda seconds: seconds.total)
    handed = hand_over_seconds(layout, how, machine, width, length)
    one = slowest.total + handed
    update = max((update_seconds(layout, how, machine, s) for s in stages), key=lambda parts: sum(parts.values()))
    found = {
        "product": micro_batches * slowest.product,
        "memory": micro_batches * slowest.memory,
        "tensor_parallel": micro_batches * slowest.tensor,
        "context_parallel": micro_batches * slowest.context,
        "expert_parallel": micro_batches * slowest.experts,
        "hand_over": micro_batches * handed,
        "bubble": (len(stages) - 1) * one,
        **update,
    }
    return {"step_seconds": sum(found.values()), "micro_batches": micro_batches, "seconds": found}


def described(work: Work, how: GpuLayout, memory: Mapping[str, float]) -> dict[str, Any]:
    """A layout as plain values."""
    run = work.run
    stages = [stage_seconds(work, how, i) for i in range(len(work.stages))]
    steps = [part.steps for part in run.train.stages]
    seconds = sum(n * stage["step_seconds"] for n, stage in zip(steps, stages, strict=True))
    bytes_ = {name: n for name, n in memory.items() if name not in ("total", "stage", "pipeline_stage")}
    return {
        **sizes_of(how),
        "memory_gb": memory["total"] / BYTES_PER_GB,
        "memory_bytes": bytes_,
        "fullest": {"stage": memory["stage"], "pipeline_stage": memory["pipeline_stage"]},
        "step_seconds": seconds / sum(steps),
        "days": seconds / DAY,
        "stages": stages,
    }


def sizes_of(how: GpuLayout) -> dict[str, Any]:
    """A layout by the names of Megatron's configuration."""
    names = (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size", "data_parallel_size",
        "sequence_parallel", "micro_batch_size", "recompute_granularity",
    )  # fmt: skip
    return {name: getattr(how, name) for name in names}


def _as_before(family: Family, how: GpuLayout, stage: int) -> bool:
    """Whether a stage has as many layers of each kind as the one before it."""
    pattern = family.architecture.hybrid_override_pattern
    here, before = (sorted(pattern[layer] for layer in how.layers(family.architecture, s)) for s in (stage, stage - 1))
    return here == before


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _distributed(run: RunConfig, element: int) -> bool:
    given = run.train.use_distributed_optimizer
    return element == 2 if given is None else given
