"""The pull towards a budget, and what steers its strength.

    expected   C(pi) = outer . pi_h + sum_l P(l kept) T_kind(pi_h, pi_...)      (the dims are independent)
    loss       lambda_b max(0, |C(pi) / target - 1| - dead_zone)
    steering   lambda_b <- clip(lambda_b + rate |e_b|),  e_b = discrete cost / target - 1, while |e_b| > tolerance

The discrete cost of the argmax is what a child will have, and it parts from the expected one as the router sharpens
(METHOD section 9); so lambda grows on the DISCRETE error, and with `steer: discrete` the loss takes its value from the
discrete error and its gradient from the expected cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..budget_cost import BudgetCost
from ..choices import is_row_per_layer
from ..config.sections import RouterConfig
from ..space import DEPTH
from .selection import depth_matrix


class ExpectedCost:
    """Differentiable expected cost of one budget under independent choices, relative to its target. fp64 inside."""

    def __init__(self, cost: BudgetCost, device: torch.device | str = "cpu") -> None:
        self.cost, self.space = cost, cost.space
        tables, scale = cost.tables, 1 / cost.target
        as_tensor = {"dtype": torch.float64, "device": device}
        self.outer = torch.tensor(tables.outer, **as_tensor) * scale
        self.tables = {k: torch.tensor(t.values, **as_tensor).view(t.shape) * scale for k, t in tables.walk()}
        self.dims = {k: t.dims for k, t in tables.walk()}
        self.depth = depth_matrix(self.space, self.outer)
        self.layers = {k: torch.tensor(self.space.architecture.layers_of(k), device=device) for k in self.tables}

    def __call__(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """`C(pi) / target`, a scalar."""
        pi = {name: p.to(self.outer) for name, p in probabilities.items()}
        kept = pi[DEPTH][0] @ self.depth if DEPTH in pi else self.depth[0]
        total = self._row(pi, "hidden_size")[0] @ self.outer
        for kind, table in self.tables.items():
            total = total + kept[self.layers[kind]] @ self._layer_costs(pi, kind, table)
        return total

    def _row(self, pi: Mapping[str, Tensor], name: str) -> Tensor:
        """`[rows, choices]`; a dim with a single choice is certain."""
        return pi[name] if name in pi else self.outer.new_ones(1, 1)

    def _layer_costs(self, pi: Mapping[str, Tensor], kind: str, table: Tensor) -> Tensor:
        """Expected cost of every layer of a kind, `[layers of the kind]` or `[1]` broadcast over them."""
        costs = table[None]  # [rows, remaining choices...]: contract the dims one by one, first axis after rows
        for name in self.dims[kind]:
            row = self._row(pi, name)
            if row.shape[0] > 1 and not is_row_per_layer(self.space, name):
                raise ValueError(f"{name}: {row.shape[0]} rows given, but the dim has one value per net")
            count = max(row.shape[0], costs.shape[0])
            flat = costs.expand(count, *costs.shape[1:]).reshape(count, costs.shape[1], -1)
            mixed = torch.einsum("rc,rcx->rx", row.expand(count, -1), flat)
            costs = mixed.reshape(count, *costs.shape[2:])
        return costs.expand(len(self.layers[kind]))


def relative_error_loss(ratio: Tensor, dead_zone: float) -> Tensor:
    """`max(0, |ratio - 1| - dead_zone)` of a cost ratio to its target."""
    return torch.relu((ratio - 1).abs() - dead_zone)


def budget_loss(expected_ratio: Tensor, discrete_error: float, weight: float, config: RouterConfig) -> Tensor:
    """lambda-weighted budget loss of one budget.

    Args:
        expected_ratio: `ExpectedCost(...)`, with gradient.
        discrete_error: `discrete cost / target - 1` of the noise-free argmax.
        weight: this budget's lambda (`BudgetSteering.weight`).
    """
    if config.recipe == "paper":
        return weight * relative_error_loss(expected_ratio, config.dead_zone)
    steered = expected_ratio + (1 + discrete_error - expected_ratio.detach())
    return weight * relative_error_loss(steered, config.dead_zone)


def full_network_loss(probabilities: Mapping[str, Tensor]) -> Tensor:
    """Pulls every dim to the parent's size: mean of `-log pi_0` over rows. For a full budget that is not pinned."""
    rows = torch.cat([p[:, 0] for p in probabilities.values()])
    return -torch.log(rows.clamp_min(torch.finfo(rows.dtype).tiny)).mean()


@dataclass
class BudgetSteering:
    """lambda per budget; explicit state, saved with the run. Equal on all ranks, being fed by noise-free argmaxes."""

    weights: dict[str, float] = field(default_factory=dict)

    def weight(self, name: str, config: RouterConfig) -> float:
        """This budget's lambda now."""
        return self.weights.get(name, config.budget_lambda)

    def update(self, name: str, discrete_error: float, config: RouterConfig) -> None:
        """Dual ascent on the discrete error, once per step and budget; back towards the start once it is met."""
        now, size = self.weight(name, config), abs(discrete_error)
        if size > config.tolerance:
            now = min(config.max_lambda, now + config.dual_ascent_rate * size)
        self.weights[name] = now

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """From the checkpoint."""
        self.weights = {name: float(weight) for name, weight in state.items()}
