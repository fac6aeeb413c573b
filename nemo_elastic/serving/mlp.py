"""The MLP of a child, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .linear import Linear
from .parts import Parts, rms_norm


@dataclass(frozen=True)
class MLP:
    """Neurons between two products; it remembers nothing. `gated`: `up` gives `[gate; up]`."""

    norm: Tensor
    eps: float
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]
    gated: bool

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> None:
        """Nothing."""
        return None

    def __call__(self, x: Tensor, cache: None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        y = self.up(rms_norm(x, self.norm, self.eps))
        if not self.gated:
            return x + self.down(self.activation(y))
        gate, up = y.chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)


def layer(parts: Parts) -> MLP:
    """A layer from its parameters."""
    return MLP(
        norm=parts.vector("pre_mlp_layernorm.weight"),
        eps=parts.eps,
        up=parts.matrix("mlp.linear_fc1.weight"),
        down=parts.matrix("mlp.linear_fc2.weight"),
        activation=parts.activation,
        gated=parts.architecture.gated_linear_unit,
    )
