"""The only code that cuts tensors: which entries of an axis a subnet keeps, and take, scatter and permute by them.

Identities: `scatter(take(w)) == w` on the kept entries and zero elsewhere; `permute` followed by its inverse is the
identity; the units that a smaller size keeps are among those of a larger one. Torch only; every function works on a
whole tensor or on a tensor-parallel shard, by the table (`ParamLayout.tp_size`) that it is given.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .layout import Axis, Factor, ParamSpec, Segment


def kept_index(axis: Axis, sizes: Mapping[str, int]) -> Tensor | None:
    """Positions along `axis` that a child of `sizes` keeps, ascending int64; None when it keeps all."""
    pieces, offset, whole = [], 0, True
    for segment in axis:
        index = _segment_index(segment, sizes)
        whole = whole and len(index) == segment.length({})
        pieces.append(index + offset)
        offset += segment.length({})
    return None if whole else torch.cat(pieces)


def _segment_index(segment: Segment, sizes: Mapping[str, int]) -> Tensor:
    index = torch.zeros(1, dtype=torch.int64)
    for factor in segment.factors:
        kept = _factor_index(factor, factor.kept(sizes))
        index = (index[:, None] * factor.length({}) + kept).flatten()
    return index


def _factor_index(factor: Factor, kept: int) -> Tensor:
    unit = torch.cat([torch.arange(kept), torch.arange(factor.count, factor.count + factor.fixed)])
    group = torch.arange(factor.local_groups) * (factor.count + factor.fixed)
    return (group[:, None] + unit).flatten()


def take(tensor: Tensor, spec: ParamSpec, sizes: Mapping[str, int]) -> Tensor:
    """The child's part of a parent's parameter. A view where every cut axis is a plain prefix, else a copy."""
    for number, axis in enumerate(spec.axes):
        tensor = take_axis(tensor, number, axis, sizes)
    return tensor


def take_axis(tensor: Tensor, number: int, axis: Axis, sizes: Mapping[str, int]) -> Tensor:
    """`take` along one axis of a tensor (weights or activations)."""
    if _is_plain_prefix(axis):
        return tensor.narrow(number, 0, axis[0].length(sizes))
    index = kept_index(axis, sizes)
    return tensor if index is None else tensor.index_select(number, index.to(tensor.device))


def _is_plain_prefix(axis: Axis) -> bool:
    factor = axis[0].factors[0]
    return len(axis) == 1 and len(axis[0].factors) == 1 and factor.local_groups == 1 and not factor.fixed


def scatter(child: Tensor, spec: ParamSpec, sizes: Mapping[str, int], into: Tensor) -> Tensor:
    """Write a child's tensor back to where `take` found it; the rest of `into` is left as it is. Returns `into`."""
    grid = [kept_index(axis, sizes) for axis in spec.axes]
    where = [torch.arange(n) if index is None else index for index, n in zip(grid, into.shape, strict=True)]
    into[torch.meshgrid(*[w.to(into.device) for w in where], indexing="ij")] = child
    return into


def unit_mask(axis: Axis, masks: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Per-position multiplier of an axis from per-unit masks (dim -> [this rank's units]); 1 where a dim has none."""
    pieces = []
    for segment in axis:
        piece = like.new_ones(1)
        for factor in segment.factors:
            piece = (piece[:, None] * _factor_mask(factor, masks, like)).flatten()
        pieces.append(piece)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _factor_mask(factor: Factor, masks: Mapping[str, Tensor], like: Tensor) -> Tensor:
    mask = masks.get(factor.dim) if factor.dim else None
    if mask is None:
        return like.new_ones(factor.length({}))
    grid = mask.view(factor.local_groups, factor.count)
    if factor.fixed:
        grid = torch.cat([grid, grid.new_ones(factor.local_groups, factor.fixed)], dim=1)
    return grid.flatten()


def permute(tensor: Tensor, spec: ParamSpec, orders: Mapping[str, Tensor], *, inverse: bool = False) -> Tensor:
    """Reorder units: `orders[dim][new] == old` over all units of the dim (groups flattened). Whole tensors only.

    Units that no child loses (K and V rows, B, C) move with nothing; an order must keep units in their group where the
    group has fixed units or other tensors depend on it (`importance.sorting` makes such orders).
    """
    for number, axis in enumerate(spec.axes):
        index = _axis_order(axis, orders)
        if index is not None:
            tensor = tensor.index_select(number, (torch.argsort(index) if inverse else index).to(tensor.device))
    return tensor


def _axis_order(axis: Axis, orders: Mapping[str, Tensor]) -> Tensor | None:
    if not any(f.dim in orders for s in axis for f in s.factors):
        return None
    pieces, offset = [], 0
    for segment in axis:
        index = torch.zeros(1, dtype=torch.int64)
        for factor in segment.factors:
            index = (index[:, None] * factor.length({}) + _factor_order(factor, orders)).flatten()
        pieces.append(index + offset)
        offset += segment.length({})
    return torch.cat(pieces)


def _factor_order(factor: Factor, orders: Mapping[str, Tensor]) -> Tensor:
    positions = torch.arange(factor.length({})).view(factor.local_groups, factor.count + factor.fixed)
    if factor.dim not in orders:
        return positions.flatten()
    order = orders[factor.dim].to(torch.int64)
    units, fixed = positions[:, : factor.count].flatten(), positions[:, factor.count :]
    return torch.cat([units[order].view(factor.local_groups, factor.count), fixed], dim=1).flatten()
