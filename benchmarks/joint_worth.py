"""Objectives without weights in which units count by what else is kept, and what searches by scores make of them.

A toy net: every Mamba layer and the next FFN layer are a pair of worth 1, every attention layer is worth 1; the hidden
size is fixed. With k of a layer the share of its worth that is kept, 0 where the layer is gone:

    apart     pair = (k_mamba + k_ffn) / 2                            a control: scores of single units say it all
    together  pair = gates * sum over i of u_i mamba_i ffn_i          block i of neurons reads what heads i write
    spare     loss = (1 - k_mamba) (1 - k_ffn), and 0.05 (1 - k) of each       each does what the other did

Scores are measured on the objective itself, one at a time from the parent: a unit's squared score is what is lost
without that unit alone (in every layer of its kind and every group: they share a mask), a layer's what is lost without
it. `Damage` adds squared scores, so that these are the scores with which it is best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from nemo_elastic.cost.budget import BudgetCost
from nemo_elastic.router.selection import SoftMasks, one_hot, soft_masks
from nemo_elastic.shapes.candidates import candidates
from nemo_elastic.shapes.damage import HIDDEN, Damage, Scores
from nemo_elastic.shapes.greedy import greedy_selection
from nemo_elastic.space.choices import Selection, choice_shapes, layers_of_dim, selection_of
from nemo_elastic.space.elastic_space import ElasticSpace

OWN = 0.05  # of `spare`: what each of a pair is worth besides, so that scores are not all 0
POWER = 0.5  # how fast later units lose worth
DIMS = ("mamba_num_heads", "ffn_hidden_size", "num_attention_heads")
CANDIDATES = 6  # as many as `router.candidates`


class JointWorth:
    """Loss of masks in which FFN and Mamba layers count in pairs."""

    def __init__(self, space: ElasticSpace, kind: str) -> None:
        self.space, self.kind, self.units = space, kind, {}
        for name in DIMS:
            value = torch.arange(1, self._count(name) + 1, dtype=torch.float32) ** -POWER
            self.units[name] = value / value.sum()
        heads = self.units["mamba_num_heads"]
        self.block = self._count("ffn_hidden_size") // len(heads)  # neurons that read one head
        self.units["ffn_hidden_size"] = heads.repeat_interleave(self.block) / self.block
        self.layers = {name: list(layers_of_dim(space, name)) for name in DIMS}

    def _count(self, name: str) -> int:
        return self.space.dims[name].full // self.space.dims[name].groups

    def lost(self, masks: Any) -> torch.Tensor:
        """Worth of what the masks cut off."""
        kept = {name: (worth * masks.dims[name][0]).sum() for name, worth in self.units.items()}
        mamba, ffn, attention = (masks.layers[self.layers[name]] for name in DIMS)
        m, f = mamba * kept["mamba_num_heads"], ffn * kept["ffn_hidden_size"]
        if self.kind == "together":
            reads = masks.dims["ffn_hidden_size"][0].view(-1, self.block).mean(-1)
            both = (self.units["mamba_num_heads"] * masks.dims["mamba_num_heads"][0] * reads).sum()
            pairs = 1 - mamba * ffn * both
        elif self.kind == "spare":
            pairs = (1 - m) * (1 - f) + OWN * (2 - m - f)
        else:
            pairs = (2 - m - f) / 2
        lost = pairs.sum() + (1 - attention * kept["num_attention_heads"]).sum()
        return lost / (len(pairs) + len(attention))

    def lost_by(self, selection: Selection) -> float:
        """The same of a shape."""
        like = {name: torch.zeros(shape) for name, shape in choice_shapes(self.space).items()}
        return self.lost(soft_masks(self.space, one_hot(selection, like))).item()

    def scores(self) -> Scores:
        """What a ranking would measure."""
        return measured_scores(self.space, DIMS, self.lost)

    def best(self, costs: Mapping[str, BudgetCost], tolerance: float) -> dict[str, Selection]:
        """Per budget the shape that loses least of all that fit, by trying every one."""
        shapes = choice_shapes(self.space)
        every = [
            {n: (i,) for n, i in zip(shapes, picked, strict=True)}
            for picked in product(*(range(choices) for _, choices in shapes.values()))
        ]
        lost = [self.lost_by(selection) for selection in every]
        found = {}
        for name, cost in costs.items():
            fits = [i for i, selection in enumerate(every) if cost.error(cost.tables.cost(selection)) <= tolerance]
            found[name] = every[min(fits, key=lambda i: lost[i])]
        return found


def measured_scores(space: ElasticSpace, names: Sequence[str], lost: Callable[[SoftMasks], torch.Tensor]) -> Scores:
    """Scores on an objective itself: every unit and every layer taken away alone from the parent."""
    shapes, architecture = choice_shapes(space), space.architecture
    rows = {name: shapes[name][0] if name in shapes else 1 for name in names}
    dims = {name: torch.ones(rows[name], space.dims[name].full // space.dims[name].groups) for name in names}
    layers = torch.ones(architecture.num_layers)

    def worth(masks: SoftMasks) -> float:
        return max(0.0, lost(masks).item())

    widths, alone = {}, {}
    for name, mask in dims.items():
        found = []
        for row in range(len(mask)):
            scores = []
            for unit in range(mask.shape[1]):
                without = mask.clone()
                without[row, unit] = 0
                scores.append(worth(SoftMasks({**dims, name: without}, layers)) ** 0.5)
            found.append(scores * space.dims[name].groups)
        cut = range(len(layers)) if name == HIDDEN else layers_of_dim(space, name)
        widths[name] = {layer: found[i if len(found) > 1 else 0] for i, layer in enumerate(cut)}
    for layer in range(len(layers)):
        without = layers.clone()
        without[layer] = 0
        alone[layer] = worth(SoftMasks(dims, without))
    return Scores(widths=widths, layers=alone)


def searched(objective: Any, cost: BudgetCost, tolerance: float) -> dict[str, float]:
    """What is truly lost by greedy search's shape, the wide search's first, and the best of all that it proposes."""
    damage = Damage(objective.space, objective.scores())
    proposed = candidates(cost, damage, count=CANDIDATES, tolerance=tolerance)
    lost = [objective.lost_by(selection_of(objective.space, found.subnet)) for found in proposed]
    greedy = greedy_selection(cost, damage, tolerance=tolerance)
    return {"greedy": objective.lost_by(greedy), "wide": lost[0], "race": min(lost)}
