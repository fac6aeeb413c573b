"""Width scores as pure functions: activations -> one importance per unit.

    score_i = finish( sum_b sample( sum_s element(a[s, b, i]) ) )

with `mean_l2` (Minitron, METHOD section 3): `sqrt(sum_b (mean_s |a|)^2)`. The three parts are additive over the
sequence, over samples and so over ranks: partial sums are reduced before the next part is applied. Sums over the
sequence are taken in fp32 (fp64 stays), sums over samples in fp64.

Named choices (`RankConfig`): where an activation is taken (`Kind.ranking`) and how it is aggregated (`AGGREGATIONS`).
Torch only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kinds import kinds
from ..problems import Problem, ProblemsError, did_you_mean


@dataclass(frozen=True)
class Aggregation:
    """How `[s, b, n]` becomes `[n]`: an element's share, a sample's share of its sequence sum, the final step."""

    meaning: str
    element: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, int], Tensor]
    finish: Callable[[Tensor, int], Tensor]


AGGREGATIONS: dict[str, Aggregation] = {
    "mean_l2": Aggregation(
        "mean of |a| over the sequence, L2 over samples",
        Tensor.abs,
        lambda total, s: (total / s).square(),
        lambda total, samples: total.sqrt(),
    ),
    "l2_l2": Aggregation(
        "L2 over sequence and samples", Tensor.square, lambda total, s: total, lambda total, samples: total.sqrt()
    ),
    "mean_mean": Aggregation(
        "mean of |a| over sequence and samples",
        Tensor.abs,
        lambda total, s: total / s,
        lambda total, samples: total / samples,
    ),
}

CHOICES: dict[str, Mapping[str, Any]] = {
    "rank.aggregation": AGGREGATIONS,
    **{f"rank.{name}": sites for kind in kinds() for name, sites in kind.ranking.items()},
}


def check_choices(**chosen: str) -> None:
    """Check named choices, `aggregation=`, `ffn_site=`, `mamba_site=`.

    Raises:
        ProblemsError: with every unknown name, keyed `rank.<field>`, and the nearest known one.
    """
    found = []
    for field, name in chosen.items():
        known = CHOICES[f"rank.{field}"]
        if name not in known:
            found.append(Problem(f"rank.{field}", f"{name!r} is no choice{did_you_mean(str(name), known)}"))
    if found:
        raise ProblemsError(found)


def sequence_sum(activation: Tensor, aggregation: Aggregation) -> Tensor:
    """`[s, b, n]` -> `[b, n]`: sum over (this rank's part of) the sequence, in fp32 or fp64."""
    wide = activation if activation.dtype == torch.float64 else activation.float()
    return aggregation.element(wide).sum(0)


def sample_sum(sequence_sums: Tensor, sequence_length: int, aggregation: Aggregation) -> Tensor:
    """`[b, n]` sums over the WHOLE sequence -> `[n]`: what the samples of one micro-batch add, in fp64."""
    return aggregation.sample(sequence_sums.double(), sequence_length).sum(0)


def contribution_grams(weight: Tensor, heads: int) -> Tensor:
    """`W_i^T W_i` of every head's columns of out_proj: `[h, heads * p]` -> `[heads, p, p]`."""
    columns = weight.detach().float().unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, h, p]
    return columns.transpose(1, 2) @ columns


def head_contribution(activation: Tensor, grams: Tensor) -> Tensor:
    """Norm of what each head adds after out_proj: `[s, b, heads * p]` -> `[s, b, heads]`.

    `||W_i y_i||^2 == y_i^T (W_i^T W_i) y_i`, so the `[s, b, heads, h]` contributions are never made.
    """
    y = activation.to(grams.dtype).unflatten(-1, (grams.shape[0], -1))
    return torch.einsum("sbmp,mpq,sbmq->sbm", y, grams, y).clamp_min(0).sqrt()


def channel_contribution(activation: Tensor, grams: Tensor) -> Tensor:
    """Norm of what each channel adds after out_proj, `|y_c| ||W_c||`: `[s, b, heads * p]`, same shape."""
    return activation.to(grams.dtype).abs() * grams.diagonal(dim1=1, dim2=2).sqrt().flatten()


def mamba_channel_scores(scores: Tensor) -> Tensor:
    """Scores of all (head, channel) pairs `[m, p]` -> one score per channel `[p]`: L2 over heads."""
    return torch.linalg.vector_norm(scores, dim=0)


def mamba_head_scores(scores: Tensor, top_channels: int) -> Tensor:
    """`[m, p]` -> `[m]`: L2 over the `top_channels` best channels, the same for every head."""
    best = mamba_channel_scores(scores).argsort(descending=True, stable=True)[:top_channels]
    return torch.linalg.vector_norm(scores[:, best], dim=1)


def attention_head_scores(scores: Tensor) -> Tensor:
    """Scores of the channels that enter linear_proj `[q, d]` -> `[q]`: L2 over a head's channels."""
    return torch.linalg.vector_norm(scores, dim=1)
