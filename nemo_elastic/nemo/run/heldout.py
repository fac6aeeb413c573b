"""The held-out text of a run, and what a subnet loses on it: in all, and per source of a blend.

loss = sum over sources of weight x loss of the source / sum of weights          weight: tokens whose loss counts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nemo_elastic.config.sections import RunConfig
from nemo_elastic.data.blend import spread_by_source
from nemo_elastic.mcore.elastic.plan import Plan
from nemo_elastic.mcore.models.evaluate import heldout_sums
from nemo_elastic.nemo.plain.data import TextDataModule, collate


@dataclass(frozen=True)
class Measured:
    """Held-out loss in nats per token; `sources`: {name: {loss, tokens}}, empty where there is one source."""

    loss: float
    sources: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Heldout:
    """Held-out batches, the same on all ranks.

    Attributes:
        batches: (tokens, labels[, mask]) `[b, s]`.
        groups: of each batch, the number of every sample's source.
        names: of the sources, in the order of `data.blend`.
    """

    batches: list[tuple[Tensor, ...]]
    groups: list[list[int]]
    names: tuple[str, ...]

    def measure(self, model: nn.Module, plan: Plan) -> Measured:
        """What a subnet loses here; collective."""
        by_group = heldout_sums(model, self.batches, plan, self.groups)
        sums = [(total, weight) for total, weight in by_group.tolist()]
        loss = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
        if len(self.names) < 2:
            return Measured(loss, {})
        named = zip(self.names, sums, strict=False)  # sources behind the last one drawn have no group
        return Measured(loss, {name: {"loss": t / w, "tokens": w} for name, (t, w) in named if w})


def heldout_of(data: TextDataModule, run: RunConfig, *, between: bool = False) -> Heldout:
    """`train.val_samples` windows, spread evenly over held-out text; at most every second window there is.

    Args:
        between: others, half-way between these: to choose by, where losses are reported on the first.
    """
    found = spread_by_source(data.windows("heldout"), run.train.val_samples, between=between)
    size = run.train.stages[-1].micro_batch_size or run.train.micro_batch_size
    pieces = [found[i : i + size] for i in range(0, len(found), size)]
    return Heldout(
        batches=[collate([sample for _, sample in piece]) for piece in pieces],
        groups=[[source for source, _ in piece] for piece in pieces],
        names=source_names(run.data.blend),
    )


def source_names(blend: Sequence[Any]) -> tuple[str, ...]:
    """The paths of a blend's entries; one that is there twice has its number behind it."""
    paths = [str(entry.path) for entry in blend]
    return tuple(p if paths.count(p) == 1 else f"{p} ({paths[:i].count(p) + 1})" for i, p in enumerate(paths))
