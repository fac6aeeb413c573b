"""The only code that cuts tensors: which entries of an axis a subnet keeps; take, scatter, mask, permute by them.

Identities: `scatter(take(w)) == w` on the kept entries and zero elsewhere; `permute` followed by its inverse is the
identity; the units that a smaller size keeps are among those of a larger one. Torch only. Every function works on a
whole tensor or on a tensor-parallel shard, by the table (`ParamLayout.tp_size`) whose rows it is given.

Cutting is done by strided views, block by block: a block is what one segment (and the elastic or the fixed part of
its factors) contributes, so that copying, accumulating and scattering are plain elementwise operations.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .dims import WITHIN
from .layout import Axis, Factor, ParamSpec, Segment

Sizes = Mapping[str, int]


def is_whole(spec: ParamSpec, sizes: Sizes) -> bool:
    """True when a child of `sizes` keeps all of the parameter."""
    return all(factor.kept(sizes) == factor.count for axis in spec.axes for s in axis for factor in s.factors)


def take(tensor: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
    """The child's part of a parent's parameter: the tensor or a view of it where every cut is a prefix, else a copy."""
    if all(is_prefix(axis, sizes) for axis in spec.axes):
        return _narrow(tensor, spec, sizes)
    child = tensor.new_empty(spec.shape(sizes))
    for of_parent, of_child in _paired(tensor, child, spec, sizes):
        of_child.copy_(of_parent)
    return child


def accumulate(child: Tensor, spec: ParamSpec, sizes: Sizes, into: Tensor) -> Tensor:
    """Add a child's tensor (a gradient) to where `take` found it in `into`, in place."""
    for of_parent, of_child in _paired(into, child, spec, sizes):
        of_parent.add_(of_child)
    return into


def scatter(child: Tensor, spec: ParamSpec, sizes: Sizes, into: Tensor) -> Tensor:
    """Write a child's tensor back to where `take` found it; the rest of `into` is left as it is. Returns `into`."""
    for of_parent, of_child in _paired(into, child, spec, sizes):
        of_parent.copy_(of_child)
    return into


def blocks(tensor: Tensor, axis: Axis, sizes: Sizes, at: int, *, whole: bool) -> list[Tensor]:
    """Views of the kept entries of one axis, standing at dim `at`: that dim becomes (groups, units) of every factor.

    Args:
        whole: `tensor` is the parent's; else the child's, whose blocks come in the same order with the same sizes.
    """
    return [view for view, _ in _expand(tensor, (axis,), sizes, at, parent=whole, key=())]


def is_prefix(axis: Axis, sizes: Sizes) -> bool:
    """The kept entries are one run from the start."""
    cut = [f for s in axis for f in s.factors if f.kept(sizes) != f.count]
    if not cut:
        return True
    return len(axis) == 1 and cut == [axis[0].factors[0]] and cut[0].local_groups == 1 and not cut[0].fixed


def _narrow(tensor: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
    for number, extent in enumerate(spec.shape(sizes)):
        tensor = tensor.narrow(number, 0, extent)
    return tensor


def _paired(whole: Tensor, child: Tensor, spec: ParamSpec, sizes: Sizes) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the parent's kept parts beside the same parts of the child."""
    of_whole = _expand(whole, spec.axes, sizes, 0, parent=True, key=())
    of_child = _expand(child, spec.axes, sizes, 0, parent=False, key=())
    for (left, key), (right, same) in zip(of_whole, of_child, strict=True):
        assert key == same and left.shape == right.shape
        yield left, right


def _expand(
    tensor: Tensor, axes: tuple[Axis, ...], sizes: Sizes, at: int, *, parent: bool, key: tuple
) -> Iterator[tuple[Tensor, tuple]]:
    """(view of a kept part, key): `axes` are resolved one by one; `at` is the dim where the next one stands."""
    if not axes:
        yield tensor, key
        return
    start = 0
    for segment in axes[0]:
        length = segment.length({} if parent else sizes)
        piece = tensor.narrow(at, start, length)
        start += length
        shape = [n for f in segment.factors for n in _grid(f, sizes, parent)]
        grid = piece.unflatten(at, shape)
        for view, choice in _ranges(grid, segment, sizes, at, parent=parent):
            yield from _expand(view, axes[1:], sizes, at + len(shape), parent=parent, key=(*key, segment.name, choice))


def _grid(factor: Factor, sizes: Sizes, parent: bool) -> tuple[int, int]:
    units = factor.count if parent else factor.kept(sizes)
    return factor.local_groups, units + factor.fixed


def _ranges(
    grid: Tensor, segment: Segment, sizes: Sizes, at: int, *, parent: bool
) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """The kept part of a segment's grid: a prefix of every factor, and its fixed units apart when some are cut."""
    views: list[tuple[Tensor, tuple[int, ...]]] = [(grid, ())]
    for number, factor in enumerate(segment.factors):
        dim, kept = at + 2 * number + 1, factor.kept(sizes)
        if kept == factor.count:
            views = [(view, (*choice, 0)) for view, choice in views]
            continue
        begin = factor.count if parent else kept
        views = [
            (view.narrow(dim, first, n), (*choice, part))
            for view, choice in views
            for part, (first, n) in enumerate(((0, kept), (begin, factor.fixed)))
            if n
        ]
    yield from views


def unit_mask(axis: Axis, masks: Mapping[str, Tensor]) -> Tensor:
    """Per-position multiplier `[axis]` from per-unit masks: dim -> `[count]`, the units of one group; 1 where none.

    All groups share a mask, so a tensor-parallel shard's mask needs no rank.
    """
    like = next(iter(masks.values()))
    pieces = []
    for segment in axis:
        piece = like.new_ones(1)
        for factor in segment.factors:
            piece = (piece[:, None] * _factor_mask(factor, masks, like)).flatten()
        pieces.append(piece)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _factor_mask(factor: Factor, masks: Mapping[str, Tensor], like: Tensor) -> Tensor:
    if factor.dim not in masks:
        return like.new_ones(factor.length({}))
    group = torch.cat([masks[factor.dim], like.new_ones(factor.fixed)])
    return group.repeat(factor.local_groups)


def permute(tensor: Tensor, spec: ParamSpec, orders: Mapping[str, Tensor], *, inverse: bool = False) -> Tensor:
    """Reorder units: `orders[dim][new] == old` over all units of the dim (groups flattened). Whole tensors only.

    Units that no child loses (K and V rows, B, C) stay; an order must keep units in their group where the group has
    fixed units or other tensors depend on it (`importance.sorting` makes such orders).
    """
    inner = {dim: order for dim, order in orders.items() if dim in WITHIN}
    outer = {dim: order for dim, order in orders.items() if dim not in WITHIN}
    if not inverse:
        tensor = _permute_within(tensor, spec, inner, inverse=False)
    for number, axis in enumerate(spec.axes):
        index = _axis_order(axis, outer)
        if index is not None:
            tensor = tensor.index_select(number, (torch.argsort(index) if inverse else index).to(tensor.device))
    return _permute_within(tensor, spec, inner, inverse=True) if inverse else tensor


def _permute_within(tensor: Tensor, spec: ParamSpec, orders: Mapping[str, Tensor], *, inverse: bool) -> Tensor:
    """Dims with an order for each unit of another dim, whose axis is the first; by that one's old places."""
    for number, axis in enumerate(spec.axes):
        own = {dim: order for dim, order in orders.items() if any(f.dim == dim for s in axis for f in s.factors)}
        if own:
            count = len(next(iter(own.values())))
            indices = [_axis_order(axis, {dim: order[unit] for dim, order in own.items()}) for unit in range(count)]
            indices = [torch.argsort(index) if inverse else index for index in indices]
            parts = zip(tensor, indices, strict=True)
            tensor = torch.stack([part.index_select(number - 1, index.to(part.device)) for part, index in parts])
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


def shard(tensor: Tensor, spec: ParamSpec, rank: int, expert_rank: int = 0) -> Tensor:
    """A rank's part of a whole parameter; `spec` is the row of the shard's table (`tp_size`, `ep_size` > 1).

    Args:
        rank, expert_rank: among tensor- and among expert-parallel ranks.

    Padding of the vocabulary comes as zeros.
    """
    for number, axis in enumerate(spec.axes):
        index = _shard_index(axis, expert_rank if _is_of_experts(axis) else rank)
        if index is not None:
            held = index[index < tensor.shape[number]]
            part = tensor.index_select(number, held.to(tensor.device))
            tensor = part if len(held) == len(index) else _padded(part, number, len(index) - len(held))
    return tensor


def _padded(tensor: Tensor, number: int, more: int) -> Tensor:
    shape = list(tensor.shape)
    shape[number] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=number)


def unshard(shards: list[Tensor], spec: ParamSpec, *, experts: bool = False) -> Tensor:
    """The whole parameter from all ranks' parts, in rank order; padding of the vocabulary is cut.

    Args:
        experts: the parts are of expert-parallel ranks, not of tensor-parallel ones.
    """
    for number, axis in enumerate(spec.axes):
        if _is_of_experts(axis) == experts and _shard_index(axis, 0) is not None:
            order = torch.argsort(torch.cat([_shard_index(axis, rank) for rank in range(len(shards))]))
            order = order[: len(order) - sum(f.padding for s in axis for f in s.factors)]
            return torch.cat(shards, dim=number).index_select(number, order.to(shards[0].device))
    return shards[0]


def _is_of_experts(axis: Axis) -> bool:
    return any(f.ep for s in axis for f in s.factors)


def _shard_index(axis: Axis, rank: int) -> Tensor | None:
    """Positions in the whole axis that a rank holds; None when it holds all."""
    if all(f.ranks == 1 for s in axis for f in s.factors):
        return None
    pieces, offset = [], 0
    for segment in axis:
        index, whole = torch.zeros(1, dtype=torch.int64), 1
        for factor in segment.factors:
            length = factor.length({})
            first = rank * length if factor.ranks > 1 else 0
            index = (index[:, None] * (length * factor.ranks) + first + torch.arange(length)).flatten()
            whole *= length * factor.ranks
        pieces.append(index + offset)
        offset += whole
    return torch.cat(pieces)
