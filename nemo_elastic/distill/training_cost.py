"""What the curriculum will cost before it runs: tokens, FLOPs, GPU-hours, bytes of checkpoints. Pure; no torch.

    FLOPs of a stage = sum over its steps of tokens * (teacher + sum over budgets of min(1, k p_b) student_b)
    teacher          = one forward of the parent; none where the loss does without it; with `distill.teacher: self`
                       1 - min(1, k p_full), and one more with a cache
    student_b        = three forwards of what budget b runs in that phase of the router, and the layers' once more
                       with full recomputation
    GPU-hours        = FLOPs / (report.mfu * report.peak_tflops * 1e12 * 3600)

k is `distill.budgets_per_batch`, p_b how often a budget is drawn: systematic sampling gives a micro-batch budget b with
probability min(1, k p_b). A learned budget counts as its even shrink while the router warms up, as the full width
while masks are soft, and from then on as a choice that meets its budget, for which the plan's subnet stands. With
`train.mode: masked` widths stay full and only dropped layers are saved. A teacher cache is filled once, which costs
the same forwards. Forwards are `cost.flops`; elementwise work, evaluation, ranking and selective recomputation are
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.parent_files import BUILTIN
from ..config.sections import AUTO, RunConfig, StageConfig
from ..cost.counts import flops, parameters
from ..family import Family
from ..router.schedule import Timeline, resolve_recipe
from ..space.subnet import Subnet
from .curriculum import budget_probabilities, total_steps

STATE_BYTES = 8  # Adam's two moments in fp32
MAIN_BYTES = 4  # the optimizer's own fp32 weights


def training_cost(run: RunConfig, family: Family, subnets: Mapping[str, Subnet]) -> dict[str, Any] | None:
    """The estimate as plain values; None when there is no stage or a budget has no subnet (the plan's problem then).

    Args:
        subnets: what each budget of the family will run once its choice is hard.
    """
    if not run.train.stages or {b.name for b in family.budgets} - subnets.keys():
        return None
    stages = [_stage(run, family, subnets, i) for i in range(len(run.train.stages))]
    teacher, students = (sum(stage["flops"][who] for stage in stages) for who in ("teacher", "students"))
    rate = run.report.mfu * run.report.peak_tflops * 1e12
    return {
        "stages": stages,
        "steps": sum(stage["steps"] for stage in stages),
        "tokens": sum(stage["tokens"] for stage in stages),
        "flops": {"teacher": teacher, "students": students, "total": teacher + students},
        "gpu_hours": (teacher + students) / rate / 3600,
        "assumed": {"mfu": run.report.mfu, "peak_tflops": run.report.peak_tflops},
        "checkpoint_bytes": (each := checkpoint_bytes(run, family, subnets)),
        "disk_bytes": disk_bytes(run, family, each),
    }


def checkpoint_bytes(run: RunConfig, family: Family, subnets: Mapping[str, Subnet]) -> dict[str, Any]:
    """Bytes of weights (and optimizer states) on disk: one training checkpoint, the nested one, each child.

    Training: weights, Adam's moments, and fp32 weights of the optimizer where it has its own (bf16, distributed).
    What `train.precision: auto` will be is not known here: the most it can need.
    """
    kinds = [True, False] if run.train.precision == AUTO else [run.train.precision != "32"]
    weights = max(2 if mixed else 4 for mixed in kinds)
    training = max(_training_bytes(mixed, run.train.use_distributed_optimizer) for mixed in kinds)
    total = parameters(family.layout, family.space.full_subnet())
    child = {"bfloat16": 2, "float32": 4}.get(run.export.dtype, weights)
    return {
        "training": total * training,
        "nested": total * weights,
        "children": {name: parameters(family.layout, subnet) * child for name, subnet in subnets.items()},
    }


def disk_bytes(run: RunConfig, family: Family, each: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that the whole run needs at most: training checkpoints that are kept, and one that is being written; the
    sorted parent (as its files hold it, else in fp32); nested and children; final states of a teacher cache.

    Args:
        each: `checkpoint_bytes`.
    """
    full = family.space.full_subnet()
    tokens = sum(s.steps * s.global_batch_size * s.seq_length for s in run.train.stages)
    mixed = run.train.precision not in ("32", AUTO)
    parts = {
        "training": checkpoints_kept(run)["most"] * each["training"],
        "sorted": weight_bytes(run.parent.path) or parameters(family.layout, full) * 4,
        "nested": each["nested"],
        "children": sum(each["children"].values()),
        "teacher_cache": tokens * full.hidden_size * (2 if mixed else 4) if run.distill.teacher_cache else 0,
    }
    return {**parts, "total": sum(parts.values())}


def checkpoints_kept(run: RunConfig) -> dict[str, int]:
    """How many training checkpoints a run writes, keeps to its end, and has at most at any moment."""
    steps = total_steps(run.train.stages)
    every = min(run.train.save_every_steps, max(steps, 1))
    written = -(-steps // every)
    last, forever = run.train.keep_checkpoints, run.train.keep_every_steps
    if last is None:
        return {"count": written, "kept": written, "most": written}
    old = max(0, written - last)  # the last of all may fall on no multiple, and is among the newest
    kept = min(written, last) + (sum(1 for k in range(1, old + 1) if not k * every % forever) if forever else 0)
    return {"count": written, "kept": kept, "most": min(written, kept + 1)}


def weight_bytes(parent: str | None) -> int | None:
    """Bytes of a parent's weight files; None where there are none."""
    if parent is None or parent.startswith(BUILTIN):
        return None
    folder = Path(parent).expanduser()
    files = [*folder.glob("*.safetensors"), *(folder / "weights").glob("*.distcp")]
    files = [folder] if folder.is_file() else files
    return sum(file.stat().st_size for file in files) or None


def _training_bytes(mixed: bool, distributed: bool) -> int:
    return (2 if mixed else 4) + STATE_BYTES + (MAIN_BYTES if mixed or distributed else 0)


def phase_steps(run: RunConfig, index: int) -> dict[str, int]:
    """Steps that stage `index` spends in each phase of the router."""
    stages = run.train.stages
    timeline = Timeline.of(resolve_recipe(run.router), total_steps(stages), stages)
    begin = total_steps(stages[:index])
    end = begin + stages[index].steps
    spans = timeline.spans(max(timeline.total, end))
    return {phase: max(0, min(end, last) - max(begin, first)) for phase, (first, last) in spans.items()}


def _stage(run: RunConfig, family: Family, subnets: Mapping[str, Subnet], index: int) -> dict[str, Any]:
    stage = run.train.stages[index]
    names = [b.name for b in family.budgets]
    probabilities = budget_probabilities(stage, names)
    drawn = {name: min(1.0, run.distill.budgets_per_batch * p) for name, p in probabilities.items()}
    per_step, phases = stage.seq_length * stage.global_batch_size, phase_steps(run, index)
    students = sum(
        steps
        * per_step
        * sum(p * _student(run, family, stage, subnets[name], name, phase) for name, p in drawn.items())
        for phase, steps in phases.items()
        if steps
    )
    forwards = teacher_forwards(run, family, stage) + bool(run.distill.needs_teacher and run.distill.teacher_cache)
    teacher = forwards * _forward(family, family.space.full_subnet(), stage)
    tokens = stage.steps * per_step
    return {
        "steps": stage.steps,
        "seq_length": stage.seq_length,
        "global_batch_size": stage.global_batch_size,
        "tokens": tokens,
        "budget_probabilities": probabilities,
        "router_steps": phases,
        "flops": {"teacher": tokens * teacher, "students": students},
    }


def step_flops(
    run: RunConfig,
    family: Family,
    stage: StageConfig,
    phase: str,
    running: Mapping[str, Subnet],
    tokens: Mapping[str, float],
) -> float:
    """FLOPs of one step that has run, counted as in the estimate.

    Args:
        running: what each budget ran; one that is not there counts as the whole parent.
        tokens: per budget of the step, all positions of its micro-batches, whether their loss counts or not.
    """
    full = family.space.full_subnet()
    students = (n * _student(run, family, stage, running.get(name, full), name, phase) for name, n in tokens.items())
    teacher = teacher_forwards(run, family, stage) * _forward(family, full, stage)
    return sum(students) + stage.seq_length * stage.global_batch_size * teacher


def teacher_forwards(run: RunConfig, family: Family, stage: StageConfig) -> float:
    """Forwards of a teacher beside the students' of a micro-batch, in the mean; those that fill a cache are no part."""
    distill = run.distill
    if not distill.self_taught:
        return float(distill.needs_teacher and not distill.teacher_cache)
    drawn = budget_probabilities(stage, [b.name for b in family.budgets])
    return max(0.0, 1.0 - sum(min(1.0, distill.budgets_per_batch * drawn[b.name]) for b in family.budgets if b.is_full))


def _student(run: RunConfig, family: Family, stage: StageConfig, subnet: Subnet, name: str, phase: str) -> float:
    """FLOPs per token of training one budget in one phase."""
    full = family.space.full_subnet()
    if phase == "soft" and not family.budget(name).is_full and name in family.learned:
        subnet = full
    elif run.train.mode == "masked":
        subnet = replace(full, layers=subnet.layers)
    forward = _forward(family, subnet, stage)
    output_layer = 2 * subnet.hidden_size * family.architecture.vocab_size
    again = forward - output_layer if run.train.recompute_granularity == "full" else 0.0
    return 3 * forward + again


def _forward(family: Family, subnet: Subnet, stage: StageConfig) -> float:
    return flops(family.layout, subnet, sequence_length=stage.seq_length) / stage.seq_length
