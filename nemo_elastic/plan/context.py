"""What context parallelism asks of a family: whole chunks of every sequence, and heads to share out in every child.

2 x CP chunks a sequence, and TP positions more under sequence parallelism;  heads / TP a multiple of CP, where
groups / TP is a multiple of CP or CP one of groups / TP (Megatron's rule, here for every size of a subnet)
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from ..config.sections import TrainConfig
from ..family import Family
from ..kinds import kinds_of
from ..problems import Problem, nearest_multiples
from ..space.subnet import row_of

MOST = 16  # sizes that are tried for a message


def context_problems(family: Family, train: TrainConfig) -> list[Problem]:
    """Why a family cannot be trained over `train.context_parallel_size` ranks."""
    size, tp, experts = train.context_parallel_size, train.tensor_model_parallel_size, train.expert_model_parallel_size
    if size == 1:
        return []
    found = []
    if not share_experts(size, experts):
        words = f"{experts} and train.context_parallel_size={size}: one must divide the other"
        found.append(Problem("train.expert_model_parallel_size", words))
    wrong = [f"{name} {n}" for name, n in _sizes(family) if not _is_shared(family, tp, size, name, n)]
    if wrong:
        possible = ", ".join(str(n) for n in range(1, MOST + 1) if shares_heads(family, tp, n))
        words = f"{size} context-parallel ranks cannot share the heads of {', '.join(wrong)} at tensor parallel {tp}"
        found.append(Problem("train.context_parallel_size", f"{words}; possible: {possible}"))
    step = chunk_step(tp if train.sequence_parallel else 1, size)
    for i, stage in enumerate(train.stages):
        if stage.seq_length % step:
            near = nearest_multiples(stage.seq_length, step, stage.seq_length + step)
            words = (
                f"{stage.seq_length} must be a multiple of {step} for {size} context-parallel ranks; nearest: {near}"
            )
            found.append(Problem(f"train.stages.{i}.seq_length", words))
    return found


def shares_heads(family: Family, tensor_parallel: int, context_parallel: int) -> bool:
    """Whether so many context-parallel ranks can share the heads of the parent and of every child."""
    return all(_is_shared(family, tensor_parallel, context_parallel, name, n) for name, n in _sizes(family))


def share_experts(context_parallel: int, expert_parallel: int) -> bool:
    """Whether ranks that share experts have one sample between them, or whole ones."""
    return max(context_parallel, expert_parallel) % min(context_parallel, expert_parallel) == 0


def chunk_step(tensor_parallel: int, context_parallel: int) -> int:
    """What must divide a sequence; `tensor_parallel`: 1 without sequence parallelism."""
    return lcm(2 * context_parallel if context_parallel > 1 else 1, tensor_parallel * context_parallel)


def _sizes(family: Family) -> Iterator[tuple[str, int]]:
    """(dim, size) of the parent and all that a child may have, of dims that are split over ranks."""
    pattern = family.architecture.hybrid_override_pattern
    for name in (kind.context_dim for kind in kinds_of(pattern) if kind.context_dim):
        dim, given = family.space.dims[name], [row_of(s, name) for s in family.forced.values()]
        for size in sorted({dim.full, *dim.choices, *(n for row in given for n in row)}, reverse=True):
            yield name, size


def _is_shared(family: Family, tensor_parallel: int, context_parallel: int, name: str, size: int) -> bool:
    arch = family.architecture
    return all(
        kind.shares_context(arch, {name: size}, tensor_parallel, context_parallel)
        for kind in kinds_of(arch.hybrid_override_pattern)
        if name == kind.context_dim
    )
