"""The pull towards a budget: the expected cost, its price, and the commitment to a choice that meets the budget.

    expected    r(pi) = C(pi) / target,  C = outer . pi_h + sum_l P(l kept) T_kind(pi_h, ...)     (dims are independent)
    loss        price_b (r - 1) + (lambda / 2) (r - 1)^2           augmented Lagrangian of "cost == target"
    start       price_b = shadow price by estimated damage, 0 without scores        (`shapes/shadow_price.py`)
    steering    price_b <- clip(price_b + rate e_b / soft steps),  e_b = cost of the noise-free argmax / target - 1
    commitment  mean over rows of -log pi_chosen                   chosen: the argmax, repaired to fit exactly
    soft phase  (1 - min(1, s)) loss + s commitment                s = 0, then rising to `settle_weight`
    hard phase  commitment

`|r - 1|` alone chatters: its gradient has one size on both sides of the target and, under Adam, drowns what the
children's loss says about the dims; the router saturates on whatever was cheapest to cut first (METHOD section 9).
A price that settles where a parameter is worth what it costs leaves the decision between the dims to the children's
loss. It is steered by the DISCRETE cost, which is what a child will have. r is taken from `softmax(z)`, without noise,
temperature and scale: sharpened probabilities have no gradient left, and a router that saturated 46 % above its budget
stayed there for the rest of a run, whatever the price. Flat ones say little of the argmax, so that it is then led to
the nearest choice that fits (settling), which the router's own probabilities name anew at every step.
`recipe: paper` is lambda |r - 1| on the noisy probabilities, as published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.sections import RouterConfig
from ..cost.budget import BudgetCost
from ..space.choices import Selection, is_row_per_layer
from ..space.dims import DEPTH
from .model import RouterOutput, probabilities_of
from .selection import depth_matrix, indices_on


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


def cost_probabilities(output: RouterOutput, config: RouterConfig) -> Mapping[str, Tensor]:
    """The probabilities a recipe takes the expected cost from."""
    return output.probabilities if config.recipe == "paper" else probabilities_of(output.logits, tau=1.0, scale=1.0)


def soft_phase_loss(
    output: RouterOutput,
    expected: ExpectedCost,
    price: float,
    settle: float,
    selection: Selection | None,
    config: RouterConfig,
) -> Tensor:
    """The router's own loss of one budget in the soft phase.

    Args:
        settle: `RouterPoint.settle`.
        selection: the router's choice, repaired to fit; needed when `settle` is above 0.
    """
    pull = budget_loss(expected(cost_probabilities(output, config)), price, config)
    if settle <= 0:
        return pull
    return (1 - min(1.0, settle)) * pull + settle * commitment_loss(output.logits, selection)


def budget_loss(ratio: Tensor, price: float, config: RouterConfig) -> Tensor:
    """Budget loss of one budget from its expected cost ratio r, with `config.dead_zone` taken off |r - 1|.

    Args:
        price: `BudgetSteering.price` of this budget; the paper's recipe has none.
    """
    gap = ratio - 1
    gap = torch.sign(gap) * torch.relu(gap.abs() - config.dead_zone)
    if config.recipe == "paper":
        return config.budget_lambda * gap.abs()
    return price * gap + config.budget_lambda / 2 * gap.square()


def commitment_loss(logits: Mapping[str, Tensor], selection: Selection) -> Tensor:
    """Mean over all rows of -log softmax(z) at the selection: makes a repaired choice the router's own."""
    rows = [torch.log_softmax(z, -1).gather(-1, _column(selection[n], z))[:, 0] for n, z in logits.items()]
    return -torch.cat(rows).mean()


def _column(indices: tuple[int, ...], like: Tensor) -> Tensor:
    return indices_on(indices, like.device)[:, None]


def full_network_loss(logits: Mapping[str, Tensor]) -> Tensor:
    """Pulls every dim to the parent's size; for a full budget that is learned instead of pinned."""
    return commitment_loss(logits, {name: (0,) * z.shape[0] for name, z in logits.items()})


@dataclass
class BudgetSteering:
    """Price of the cost per budget; explicit state, saved with the run. Equal on all ranks: it is fed by noise-free
    argmaxes, once per step and learned budget, whichever budgets the step's micro-batches drew.
    """

    prices: dict[str, float] = field(default_factory=dict)

    @classmethod
    def starting_at(cls, prices: Mapping[str, float], config: RouterConfig) -> "BudgetSteering":
        """Prices before the first step, such as `shapes.shadow_price`; those of other budgets are 0."""
        return cls({name: min(config.max_price, price) for name, price in prices.items()})

    def price(self, name: str) -> float:
        """This budget's price now, in units of loss per relative cost."""
        return self.prices.get(name, 0.0)

    def update(self, name: str, discrete_error: float, soft_steps: int, config: RouterConfig) -> None:
        """Dual ascent; the rate is per soft phase, so that short and long runs steer alike."""
        moved = self.price(name) + config.dual_ascent_rate * discrete_error / max(1, soft_steps)
        self.prices[name] = min(config.max_price, max(-config.max_price, moved))

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return dict(self.prices)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """From the checkpoint."""
        self.prices = {name: float(price) for name, price in state.items()}
