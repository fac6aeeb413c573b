"""What a layer of a child is made of, handed to the module that serves its kind (`Kind.serving`).

A kind's module has `layer(parts) -> Layer`: called on `[b, s, k]` and a cache it gives `x + sublayer(norm(x))`, and
`cache(batch, room, position)` makes an empty cache (None where the layer remembers nothing; with the `position` of a
step one that never grows). A cache makes a call on tokens `t .. t+s` equal to that part of a call on all of them; it is
a dataclass whose tensors have the batch first. Batch first, one device, no training. Numbers as in the elastic layers:
norms, convolution and scan in fp32 (fp64 stays), the rest in the weights' dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kinds import Kind
from ..space.architecture import Architecture
from .linear import Linear


class Layer(Protocol):
    """One layer of a child."""

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> Any:
        """An empty one with room for so many tokens, changed in place; with the `position` of a step, one that never
        grows, and that takes over what another remembers (`take`).
        """

    def __call__(self, x: Tensor, cache: Any) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`; with a cache, the tokens behind those it has seen."""


@dataclass(frozen=True)
class Parts:
    """One layer of a child: its sizes and its parameters by the name of their row.

    Attributes:
        vector, matrix: row -> a tensor cut to the child; a linear over the parent's weight, with its bias, and of what
            goes into the residual stream the multiple that the model says.
        each: row -> such a linear for every unit that the child keeps of its first axis, an expert each.
        eps: of its norm. `activation`: elementwise.
        function: what the model section says beside the sizes (`arithmetic_of`).
    """

    architecture: Architecture
    sizes: Mapping[str, int]
    vector: Callable[[str], Tensor]
    matrix: Callable[[str], Linear]
    each: Callable[[str], list[Linear]]
    eps: float
    activation: Callable[[Tensor], Tensor]
    function: Mapping[str, Any]


def build_layer(kind: Kind, parts: Parts) -> Layer:
    """The layer of a kind that can be served."""
    return importlib.import_module(kind.serving).layer(parts)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight * scale` over the last axis, in fp32 (fp64 for fp64)."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * weight.to(y.dtype)
    return (y if scale == 1.0 else y * scale).to(x.dtype)
