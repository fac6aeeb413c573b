"""How two models that should be one are compared, and what counts as the same. Torch only.

nested subnet(x) == extracted child(x)        on real text: logits, losses, most likely token
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Comparison:
    """Differences of two logits tensors `[b, s, v]`; `relative` is to the largest logit, `kl` nats per token."""

    max_abs: float
    relative: float
    kl: float
    top1_agreement: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


NOTHING = Comparison(*[math.nan] * 4)  # of a child that could not be run


def compare_logits(left: Tensor, right: Tensor) -> Comparison:
    """Compare in fp64."""
    a, b = left.double(), right.double()
    gap = (a - b).abs().max().item()  # of a child with a value that is no number, this is none either
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1).mean().item()
    agree = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    return Comparison(gap, gap / max(a.abs().max().item(), 1e-30), kl, agree)


@dataclass(frozen=True)
class ChildCheck:
    """What verification found of one child. `ok` is the conjunction of everything below it.

    Attributes:
        parameters: by the cost function (zeros that only fill up included).
        numel: counted in the model that ran.
        nested_in: larger budgets that hold all of this one.
        dtype: fp32, or what the child was cast to.
        difference: the first layer (or field) that is not the nested subnet's.
        greedy: share of the prompts that both continue alike; None: not tried. Judged in fp32 only.
    """

    budget: str
    comparison: Comparison
    loss_nested: float
    loss_child: float
    parameters: int
    numel: int
    nested_in: tuple[str, ...]
    dtype: torch.dtype
    difference: str | None = None
    format: str = "nemo"
    greedy: float | None = None

    @property
    def same_logits(self) -> bool:
        """Within the tolerances of its dtype; never true of something that is no number."""
        return (
            abs(self.loss_nested - self.loss_child) <= LOSS_TOLERANCE[self.dtype]
            and self.comparison.relative <= LOGIT_TOLERANCE[self.dtype]
        )

    @property
    def ok(self) -> bool:
        """Same tensors, same function, same size."""
        alike = self.greedy in (None, 1.0) or self.dtype != torch.float32
        return self.difference is None and self.same_logits and self.parameters == self.numel and alike

    def to_dict(self) -> dict[str, Any]:
        figures = self.comparison.to_dict() | {"loss_nested": self.loss_nested, "loss_child": self.loss_child}
        return {
            "budget": self.budget,
            "ok": self.ok,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "parameters": self.parameters,
            "numel": self.numel,
            "nested_in": list(self.nested_in),
            "format": self.format,
            "greedy": self.greedy,
            "first_difference": self.difference,
        }
