"""The router: one small independent MLP per elastic dim, from a budget to logits over the dim's choices.

    z = W2 leaky_relu(W1 budget + c1) + c2,        pi = softmax((scale z + gumbel) / tau)

`budget` is a one-hot over the learned budgets, or a blend of two neighbours for a budget in between (METHOD section 4).
A dim has one row of choices, or one per layer of its kind; depth chooses how many layers of the ranking to keep.
Always fp32 and replicated: equal on every rank, because its start comes from a generator of its own. Source:
Nemotron Elastic (arXiv 2511.16664), section on the router; Flextron (arXiv 2406.10260).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..config.sections import RouterConfig
from ..space.choices import choice_shapes
from ..space.elastic_space import ElasticSpace

LEAK = 0.1


@dataclass(frozen=True)
class RouterOutput:
    """Per dim, `[rows, choices]`: raw logits z, and the probabilities pi they give at this tau, scale and noise."""

    logits: Mapping[str, Tensor]
    probabilities: Mapping[str, Tensor]


class Router(nn.Module):
    """Logits over the choices of every dim that has something to choose.

    Args:
        budget_names: the learned budgets, in the order of the one-hot. Budgets that are pinned (the full network, a
            forced subnet) do not belong here.
        seed: of the initial weights, N(0, `config.init_std`^2), biases zero.
    """

    def __init__(
        self, space: ElasticSpace, budget_names: Sequence[str], config: RouterConfig, *, seed: int = 0
    ) -> None:
        super().__init__()
        if not budget_names:
            raise ValueError("a router needs at least one learned budget; all of elastic.budgets are pinned")
        self.budget_names = tuple(budget_names)
        self.shapes = choice_shapes(space)
        self.mlps = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for name, (rows, choices) in self.shapes.items():
            first = nn.Linear(len(self.budget_names), config.hidden_size, dtype=torch.float32, device="cpu")
            second = nn.Linear(config.hidden_size, rows * choices, dtype=torch.float32, device="cpu")
            for linear in (first, second):
                nn.init.normal_(linear.weight, std=config.init_std, generator=generator)
                nn.init.zeros_(linear.bias)
            self.mlps[name] = nn.Sequential(first, nn.LeakyReLU(LEAK), second)

    def budget_vector(self, name: str) -> Tensor:
        """One-hot `[budgets]` of a learned budget."""
        if name not in self.budget_names:
            raise ValueError(f"budget {name!r} is not learned by this router; it knows {', '.join(self.budget_names)}")
        weight = next(self.parameters())
        hot = torch.zeros(len(self.budget_names), dtype=torch.float32, device=weight.device)
        hot[self.budget_names.index(name)] = 1
        return hot

    def forward(
        self,
        budget_vector: Tensor,
        *,
        tau: float = 1.0,
        scale: float = 1.0,
        noise: Mapping[str, Tensor] | None = None,
    ) -> RouterOutput:
        """Probabilities for one budget, `[budgets]` in, `[rows, choices]` per dim out. Without noise: deterministic."""
        logits = {}
        with torch.autocast(device_type=budget_vector.device.type, enabled=False):
            for name, shape in self.shapes.items():
                logits[name] = self.mlps[name](budget_vector.float()).view(shape)
        return RouterOutput(logits, probabilities_of(logits, tau=tau, scale=scale, noise=noise))


def probabilities_of(
    logits: Mapping[str, Tensor], *, tau: float, scale: float, noise: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """pi = softmax((scale z + gumbel) / tau), per dim `[rows, choices]`."""
    found = {}
    for name, z in logits.items():
        sharpened = scale * z if noise is None else scale * z + noise[name].to(z, non_blocking=True)
        found[name] = torch.softmax(sharpened / tau, dim=-1)
    return found


def interpolated_budget(values: Mapping[str, float], value: float) -> dict[str, float]:
    """Weights over the learned budgets for a budget between two of them (LLaMaFlex); at a learned one, its one-hot.

    Raises:
        ValueError: outside the trained range; nothing is extrapolated.
    """
    ordered = sorted(values, key=values.__getitem__)
    low, high = values[ordered[0]], values[ordered[-1]]
    if not low <= value <= high:
        raise ValueError(f"budget {value:g} is outside the trained range {low:g} to {high:g}; train that budget too")
    for below, above in pairwise(ordered):
        if values[below] <= value <= values[above]:
            gap = values[above] - values[below]
            share = (value - values[below]) / gap if gap else 0.0
            return {below: 1 - share, above: share}
    return {ordered[0]: 1.0}
