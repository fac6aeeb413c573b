"""Tokens per expert and budget of an elastic run, and the expert bias, which may move by them.

    c_b[e]   tokens that a step's students of budget b sent to expert e of a layer, over all replicas
    f[e]   = sum over the budgets that keep e of   (sum of c_b over b's experts) / (number of b's experts)
    bias[e] += rate sign(f[e] - sum over the budgets that keep e of c_b[e])

With one budget this is Megatron's rule (arXiv 2408.15664). An expert is measured by the budgets that keep it alone; one
that none of a step's budgets keeps stays where it is, and soft students, of which no expert is dropped or whole, move
nothing. Counts are integers, summed over all ranks, so that every layout moves the same bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from ...space.dims import KIND_OF_DIM
from ...space.subnet import Subnet
from ..elastic.model import ElasticMambaModel
from ..kernels.routing import Router, kept_experts

COUNT = "num_moe_experts"


class ExpertLoad:
    """Counts of the layers with experts of a model, by budget.

    Args:
        model: this rank's stage.
        budgets: all of the run.

    Attributes:
        step, total: `[layers, budgets, E]`, of this step and since the last row of the log.
    """

    def __init__(self, model: ElasticMambaModel, budgets: Sequence[str]) -> None:
        self.layout, self.budgets = model.layout, tuple(budgets)
        arch = self.layout.architecture
        self.layers = arch.layers_of(KIND_OF_DIM[COUNT])
        here = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self.routers = {
            number: next(m for m in here[number].modules() if isinstance(m, Router))
            for number in self.layers
            if number in here
        }
        self.counts_all = model.config.sequence_parallel or parallel_state.get_tensor_model_parallel_rank() == 0
        shape, device = (len(self.layers), len(self.budgets), arch.num_moe_experts), next(model.parameters()).device
        self.step, self.total = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))

    @contextmanager
    def counting(self, budget: str) -> Iterator[None]:
        """Forwards inside are a student of `budget`. What a backward computes again is outside, and not counted."""
        row = self.budgets.index(budget)
        for place, number in enumerate(self.layers):
            if number in self.routers:
                self.routers[number].tally = self.step[place, row]
        try:
            yield
        finally:
            for router in self.routers.values():
                router.tally = None

    @torch.no_grad()
    def end_step(self, rate: float, hard: Mapping[str, Subnet]) -> None:
        """Sum the step's counts over all ranks, add them to `total`, and move this stage's biases.

        Args:
            rate: 0 leaves them.
            hard: what the budgets ran whose students were hard; those of others count, and move nothing.
        """
        if not self.counts_all:  # its tensor-parallel neighbour has the same tokens
            self.step.zero_()
        torch.distributed.all_reduce(self.step)
        self.total += self.step
        if rate:
            kept = torch.stack([torch.stack([self._kept(hard.get(b), n) for b in self.budgets]) for n in self.layers])
            counts = self.step * kept
            fair = kept * (counts.sum(-1, keepdim=True).double() / kept.sum(-1, keepdim=True).clamp_min(1))
            moves = rate * torch.sign(fair.sum(1) - counts.sum(1))
            for place, number in enumerate(self.layers):
                bias = None if number not in self.routers else self.routers[number].bias
                if bias is not None:
                    bias += moves[place].to(bias)
        self.step.zero_()

    def take(self, subnets: Mapping[str, Subnet]) -> dict[str, Any]:
        """What goes into the log of the steps since the last row, and begin anew.

        Returns:
            budget -> `tokens`: layer -> count per expert, None for one that the budget's subnet of now has not;
            `busiest`: the busiest expert's tokens over the mean, mean over layers; `idle`: the share of its experts
            without any.
        """
        found: dict[str, Any] = {}
        for name, counts in zip(self.budgets, self.total.transpose(0, 1).tolist(), strict=True):
            tokens = {}
            for number, row in zip(self.layers, counts, strict=True):
                kept = self._kept(subnets.get(name), number).tolist()
                if any(kept) and any(row):
                    tokens[str(number)] = [n if has else None for n, has in zip(row, kept, strict=True)]
            if tokens:
                found[name] = {"tokens": tokens, **_summary(list(tokens.values()))}
        self.total.zero_()
        return found

    def _kept(self, subnet: Subnet | None, layer: int) -> Tensor:
        """`[E]`: whether the subnet has the expert; none of a layer that it has not, and none without a subnet."""
        found = torch.zeros_like(self.step[0, 0], dtype=torch.bool)
        if subnet is not None and layer in subnet.layers:
            found[kept_experts(self.layout.axes["expert"], self.layout.sizes(subnet, layer))] = True
        return found

    def state_dict(self) -> list[Any]:
        """The counts since the last row."""
        return self.total.tolist()

    def load_state_dict(self, values: list[Any]) -> None:
        """Go on with a checkpoint's."""
        self.total.copy_(torch.tensor(values, dtype=torch.int64))


def load_of(model: ElasticMambaModel, budgets: Sequence[str]) -> ExpertLoad | None:
    """The counts of a model; None where it has no experts."""
    return ExpertLoad(model, budgets) if model.layout.architecture.layers_of(KIND_OF_DIM[COUNT]) else None


def _summary(rows: list[list[int | None]]) -> dict[str, float]:
    kept = [[n for n in row if n is not None] for row in rows]
    busiest = [max(row) * len(row) / max(1, sum(row)) for row in kept]
    idle = [row.count(0) / len(row) for row in kept]
    return {"busiest": sum(busiest) / len(busiest), "idle": sum(idle) / len(idle)}
