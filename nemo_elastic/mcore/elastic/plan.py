"""What one micro-batch runs: an explicit, frozen object that is handed to the forward.

Two modes with one meaning (DESIGN): `masked` runs full-width modules and multiplies activations, `sliced` computes
with the kept prefix of every weight. A hard plan has a `Subnet`; a soft plan (masked only) has unit masks in [0, 1]
and runs every layer. `values` carries what the router's gradient flows through, packed into one vector so that it can
be an argument of activation recomputation:

    hard: one straight-through scalar (value 1) per dim and row, and per layer;
    soft: the mask of one group's units `[count]` per dim and row, and the keep-probability per layer.

No mutable state: under 1F1B and recompute each micro-batch's backward sees its own plan (METHOD trap 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...space.dims import DEPTH, KIND_OF_DIM, WIDTH_DIMS
from ...space.layout import ParamLayout
from ...space.subnet import Subnet

Mode = Literal["masked", "sliced"]


@dataclass(frozen=True)
class LayerPlan:
    """Static part for one layer, or (`layer` None) for what lies outside the stack.

    Attributes:
        sizes: kept units per dim (hard), empty when soft.
        slots: dim -> (start, stop) in the packed values; a dim without a slot has no gradient to carry.
    """

    layer: int | None
    mode: Mode
    soft: bool
    sizes: Mapping[str, int]
    slots: Mapping[str, tuple[int, int]]

    def value(self, values: Tensor | None, dim: str) -> Tensor | None:
        """This layer's part of the packed `values`: a scalar `[]` (hard), a mask `[count]` (soft) or None."""
        if values is None or dim not in self.slots:
            return None
        start, stop = self.slots[dim]
        return values[start:stop] if self.soft and dim != DEPTH else values[start]


@dataclass(frozen=True)
class Plan:
    """What a micro-batch runs. `layers` has the layers that run, by global index; the others cost nothing."""

    mode: Mode
    soft: bool
    subnet: Subnet
    outer: LayerPlan
    layers: Mapping[int, LayerPlan]
    values: Tensor | None

    @property
    def width(self) -> int:
        """Channels of the residual stream of a sliced plan, as pipeline stages exchange it (masked: the parent's)."""
        return self.subnet.hidden_size


def hard_plan(
    layout: ParamLayout, subnet: Subnet, mode: Mode = "sliced", gates: Mapping[str, Tensor] | None = None
) -> Plan:
    """A plan that runs exactly `subnet`.

    Args:
        gates: dim -> `[rows]` straight-through scalars of value 1 (one row, or one per layer of the dim's kind);
            `num_layers` -> `[L]`, one per parent layer. None: nothing to carry (evaluation, forced subnets).
    """
    values, slots = _pack(gates, unit_axis=False)
    layers = {
        i: LayerPlan(i, mode, False, layout.sizes(subnet, i), _layer_slots(layout, slots, i)) for i in subnet.layers
    }
    outer = LayerPlan(None, mode, False, layout.sizes(subnet, None), _outer_slots(slots))
    return Plan(mode, False, subnet, outer, layers, values)


def soft_plan(layout: ParamLayout, full: Subnet, masks: Mapping[str, Tensor]) -> Plan:
    """A plan that runs every layer under soft masks.

    Args:
        full: the parent as a subnet.
        masks: dim -> `[rows, count]`, the mask of one group's units; `num_layers` -> `[L]` keep-probabilities.
    """
    values, slots = _pack(masks, unit_axis=True)
    layers = {i: LayerPlan(i, "masked", True, {}, _layer_slots(layout, slots, i)) for i in full.layers}
    return Plan("masked", True, full, LayerPlan(None, "masked", True, {}, _outer_slots(slots)), layers, values)


def _pack(parts: Mapping[str, Tensor] | None, *, unit_axis: bool) -> tuple[Tensor | None, dict[str, list]]:
    """One flat vector, and per dim the (start, stop) of each row."""
    if not parts:
        return None, {}
    slots: dict[str, list[tuple[int, int]]] = {}
    flat, at = [], 0
    for dim, tensor in parts.items():
        width = tensor.shape[-1] if unit_axis and dim != DEPTH else 1
        rows = tensor.numel() // width
        slots[dim] = [(at + row * width, at + (row + 1) * width) for row in range(rows)]
        flat.append(tensor.reshape(-1))
        at += tensor.numel()
    return torch.cat(flat), slots


def _layer_slots(layout: ParamLayout, slots: Mapping[str, list], layer: int) -> dict[str, tuple[int, int]]:
    pattern = layout.architecture.hybrid_override_pattern
    kind, found = pattern[layer], _outer_slots(slots)
    for dim in WIDTH_DIMS:
        if dim in slots and KIND_OF_DIM.get(dim) == kind:
            rows = slots[dim]
            found[dim] = rows[pattern[:layer].count(kind)] if len(rows) > 1 else rows[0]
    if DEPTH in slots:
        found[DEPTH] = slots[DEPTH][layer]
    return found


def _outer_slots(slots: Mapping[str, list]) -> dict[str, tuple[int, int]]:
    return {"hidden_size": slots["hidden_size"][0]} if "hidden_size" in slots else {}
