"""The MLP of a child."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .linear import Linear
from .parts import Parts, rms_norm


@dataclass(frozen=True)
class MLP:
    """Two products and an elementwise activation; it remembers nothing."""

    norm: Tensor
    eps: float
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> None:
        """Nothing."""
        return None

    def __call__(self, x: Tensor, cache: None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        return x + self.down(self.activation(self.up(rms_norm(x, self.norm, self.eps))))


def layer(parts: Parts) -> MLP:
    """A layer from its parameters."""
    return MLP(
        norm=parts.vector("pre_mlp_layernorm.weight"),
        eps=parts.eps,
        up=parts.matrix("mlp.linear_fc1.weight"),
        down=parts.matrix("mlp.linear_fc2.weight"),
        activation=parts.activation,
    )
