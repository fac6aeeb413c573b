"""What a layer is called with: its static plan and the micro-batch's tensors, and the multipliers they imply.

Where masks act (METHOD section 2): the residual stream (embedding and every sub-layer's output), FFN neurons before
`linear_fc2`, attention heads before `linear_proj`, Mamba's x behind the convolution (so that its bias does not leak).
Where straight-through gates of hard plans act: on the same inner activations, but the hidden gate multiplies the
norms' outputs and the Mamba gates the gated norm's output. A scalar on the residual stream, or in front of a
norm, would be divided out again by the norm and carry no gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...space.dims import DEPTH
from ...space.layout import Axis
from ...space.slicing import unit_mask
from .plan import LayerPlan


@dataclass(frozen=True)
class LayerCall:
    """One layer's plan with the tensors of the micro-batch.

    Attributes:
        values: `[2, n]` packed values of the plan or None. Row 0 enters activations that all tensor-parallel ranks
            hold in full, row 1 those of which a rank holds a part: its gradient is summed over the ranks.
        hidden_mask: `[h]` multiplier of the residual stream, None when sliced or all ones.
        rotary: the angles `[s, 1, 1, d]` of positions (`kernels.positions`), None without positions.
    """

    plan: LayerPlan
    values: Tensor | None
    hidden_mask: Tensor | None
    rotary: Tensor | None = None

    def with_tensors(self, values: Tensor | None, hidden_mask: Tensor | None) -> "LayerCall":
        """The same call on other tensors (recomputation hands in detached ones)."""
        return replace(self, values=values, hidden_mask=hidden_mask)

    @property
    def sliced(self) -> bool:
        return self.plan.mode == "sliced"

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.plan.sizes

    @property
    def cut(self) -> Mapping[str, int]:
        """The sizes that parameters are cut to: the subnet's when sliced, else nothing is."""
        return self.plan.sizes if self.sliced else {}

    def replicated(self, dim: str) -> Tensor | None:
        """The value of a dim for activations that every tensor-parallel rank holds in full."""
        return None if self.values is None else self.plan.value(self.values[0], dim)

    def split(self, dim: str) -> Tensor | None:
        """The value of a dim for activations that are split over tensor-parallel ranks."""
        return None if self.values is None else self.plan.value(self.values[1], dim)

    def hidden_gate(self) -> Tensor | None:
        """Scalar for norm outputs; None when soft or without gradient."""
        return None if self.plan.soft else self.replicated("hidden_size")

    def layer_gate(self) -> Tensor | None:
        """Scalar for the sub-layer's output: keep-probability when soft, 1 with a gradient when hard."""
        return self.replicated(DEPTH)

    def kept_hidden(self) -> Tensor | int:
        """Channels that count in a norm's mean (METHOD section 2)."""
        return self.hidden_mask.sum() if self.plan.soft else self.sizes["hidden_size"]


class MaskCache:
    """Constant prefix masks of hard plans, made once per size and device; one per module, so nothing is global."""

    def __init__(self) -> None:
        self._made: dict[tuple, Tensor] = {}

    def prefix(self, axis: Axis, sizes: Mapping[str, int], like: Tensor) -> Tensor | None:
        """0/1 multiplier `[axis]` of a hard subnet in the dtype and on the device of `like`; None: all ones."""
        factors = [f for s in axis for f in s.factors if f.dim in sizes]
        if all(f.kept(sizes) == f.count for f in factors):
            return None
        key = (tuple(s.name for s in axis), tuple((f.dim, sizes[f.dim]) for f in factors), like.dtype, like.device)
        if key not in self._made:
            # A tensor made in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = unit_mask(axis, {f.dim: prefix_mask(f.count, f.kept(sizes), like) for f in factors})
        return self._made[key]

    def ones(self, count: int, like: Tensor) -> Tensor:
        """`[count]` ones, made once."""
        key = (count, like.dtype, like.device)
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = torch.ones(count, dtype=like.dtype, device=like.device)
        return self._made[key]


def prefix_mask(count: int, kept: int, like: Tensor) -> Tensor:
    """`[count]`: 1 for the first `kept` units, else 0."""
    return (torch.arange(count, device=like.device) < kept).to(like.dtype)


def inner_multiplier(
    call: LayerCall, axis: Axis, dims: tuple[str, ...], cache: MaskCache, like: Tensor
) -> Tensor | None:
    """What multiplies the (tensor-parallel) input of a down-projection whose axis is made of `dims`.

    Soft: the masks. Hard and masked: the prefix times the gates. Sliced: the gates alone. None: nothing to do.
    """
    if call.plan.soft:
        return soft_multiplier(call, axis, dims)
    gate = product([call.split(dim) for dim in dims])
    if call.sliced:
        return gate
    mask = cache.prefix(axis, call.sizes, like)
    return product([mask, None if gate is None else gate.to(like.dtype)])


def soft_multiplier(call: LayerCall, axis: Axis, dims: tuple[str, ...]) -> Tensor | None:
    """Soft masks of `dims` spread over an axis `[axis]`; None when none of them is learned."""
    masks = {dim: value for dim in dims if (value := call.split(dim)) is not None}
    return unit_mask(axis, masks) if masks else None


def product(factors: list[Tensor | None]) -> Tensor | None:
    """Product of the factors that are there."""
    result = None
    for factor in factors:
        if factor is not None:
            result = factor if result is None else result * factor
    return result


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """`x * factor` in the dtype of `x`."""
    return x if factor is None else x * factor.to(x.dtype)
