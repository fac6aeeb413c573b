"""An objective in which searches by scores must fail: layers in pairs, each of which can do the work of both.

FFN layers 1 and 2, 3 and 4, ... of a net are twins, and so are its Mamba layers (the odd last one has none). With w the
share of a layer's units that is kept, all alike, and k the share of its own worth, most of it in its first units:

    loss = (sum over pairs of (1 - w_a) (1 - w_b) + 0.05 * sum over all layers of (1 - k)) / pairs

A score is what is lost without one unit, or one layer, and all else there. Its twin then does the work, so that the
work of pairs is in no score at all: scores are to the last digit those of the net without it (`work=False`), and
whatever search they feed finds the same shape for both. There it is right to thin out twins alike, since later units
are worth less; here that costs (1 - w)^2, where one left whole and the other cut as far as it goes costs nothing. The
gradient of a mixture has it: a layer's is weighted by what its twin lacks, so that the one that is ahead stays ahead.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from joint_worth import DIMS, OWN, POWER, JointWorth, measured_scores

from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.shapes.damage import Scores
from nemo_elastic.space.choices import kept_by_depth, layers_of_dim
from nemo_elastic.space.elastic_space import ElasticSpace

LETTERS = dict(zip(DIMS, "M-*", strict=True))
PAIRED = DIMS[:2]
WIDTHS = [1.0, 0.75, 0.5, 0.25]
CHOICES = {
    "hidden_size": [1.0],
    "ffn_hidden_size": WIDTHS,
    "mamba_num_heads": WIDTHS,
    "num_attention_heads": [1.0, 0.75, 0.5],
    "num_layers": [16, 15, 14, 13, 12],
}
Option = tuple[float, float, float]  # of one layer: cost, own worth that is lost, work that is kept
Point = tuple[float, float]  # cost, loss


class Twins:
    """Loss of masks; every layer of a paired kind may have a width of its own."""

    def __init__(self, space: ElasticSpace, *, work: bool = True) -> None:
        self.space, self.work = space, work
        self.layers = {name: list(layers_of_dim(space, name)) for name in DIMS}
        self.pairs = sum(len(self.layers[name]) // 2 for name in PAIRED)
        self.own = {}
        for name in DIMS:
            value = torch.arange(1, space.dims[name].full // space.dims[name].groups + 1, dtype=torch.float32) ** -POWER
            self.own[name] = value / value.sum()

    def lost(self, masks: Any) -> torch.Tensor:
        """Worth of what the masks cut off."""
        total = torch.zeros(())
        for name, own in self.own.items():
            mask = masks.dims.get(name, torch.ones(1, len(own)))
            there = masks.layers[self.layers[name]]
            total = total + OWN * (1 - there * (mask @ own)).sum()
            if name in PAIRED and self.work:
                gone = 1 - there * mask.mean(-1)
                total = total + (gone[: len(gone) // 2 * 2].view(-1, 2)).prod(-1).sum()
        return total / self.pairs

    lost_by = JointWorth.lost_by

    def scores(self) -> Scores:
        """What a ranking would measure."""
        return measured_scores(self.space, DIMS, self.lost)

    def least(self, cost: BudgetCost, tolerance: float) -> float:
        """The least loss of all shapes that fit: exact, as given the depth pairs add up and may be tried one by one."""
        limit, found = (1 + tolerance) * cost.target, []
        for kept in map(set, kept_by_depth(self.space)):
            front = [(float(cost.tables.outer[0]), 0.0)]
            for name in DIMS:
                options = self._options(cost, name)
                rows = [options if layer in kept else [(0.0, OWN, 0.0)] for layer in self.layers[name]]
                if name not in PAIRED:  # one width for all
                    there = sum(layer in kept for layer in self.layers[name])
                    gone = (len(rows) - there) * OWN
                    front = _merged(front, [(there * c, there * own + gone) for c, own, _ in options], limit)
                    continue
                for a, b in zip(rows[::2], rows[1::2], strict=False):
                    both = [(x[0] + y[0], x[1] + y[1] + self.work * (1 - x[2]) * (1 - y[2])) for x, y in product(a, b)]
                    front = _merged(front, both, limit)
                if len(rows) % 2:
                    front = _merged(front, [(c, own) for c, own, _ in rows[-1]], limit)
            found += [loss for _, loss in front]
        return min(found) / self.pairs

    def _options(self, cost: BudgetCost, name: str) -> list[Option]:
        dim, own = self.space.dims[name], self.own[name]
        kept = [size // dim.groups for size in dim.choices]
        lost = [(OWN * (1 - own[:k].sum().item()), k / len(own)) for k in kept]
        costs = cost.tables.kinds[LETTERS[name]].values
        return [(c, *both) for c, both in zip(costs, lost, strict=True)]


def _merged(front: Iterable[Point], options: Iterable[Point], limit: float) -> list[Point]:
    """Sums of both that fit and that no cheaper one loses less than."""
    best: dict[float, float] = {}
    for (cost, loss), (more, added) in product(front, options):
        if cost + more <= limit:
            best[cost + more] = min(best.get(cost + more, loss + added), loss + added)
    kept: list[Point] = []
    for cost, loss in sorted(best.items()):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept
