"""Multiplying by the part of a weight that a subnet keeps, where it lies.

    y = x @ take(W)^T      without making take(W)

A child keeps a prefix of every group, so the kept part of W is a few strided views: `[G, k, in]` where the rows are
grouped (one batched product over the groups), `[out, G, k]` where the columns are (batched, then summed over the
groups). Where two dims of a product are cut (Mamba's heads and their channels), the outer one is a loop. Which views,
and where their results stand in the child's packed rows, comes from the one table (`slicing.blocks`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..space.layout import Axis, ParamSpec
from ..space.slicing import blocks, is_prefix, take

Linear = Callable[[Tensor], Tensor]


def linear(weight: Tensor, spec: ParamSpec, sizes: Mapping[str, int], *, compact: bool = False) -> Linear:
    """`x` `[..., in]` -> `[..., out]` for the kept part of `weight`: views, or `compact`, one contiguous matrix."""
    rows, columns = spec.axes
    if compact or (is_prefix(rows, sizes) and is_prefix(columns, sizes)):
        kept = take(weight, spec, sizes)
        return _Plain(compacted(kept) if compact else kept)
    out, inputs = spec.shape(sizes)
    if is_prefix(columns, sizes):
        return _GroupedRows(_blocks(weight[:, :inputs], rows, sizes, 0, out), out)
    assert is_prefix(rows, sizes), f"{spec.name} has groups on both axes"
    return _GroupedColumns(_blocks(weight[:out], columns, sizes, 1, inputs), inputs)


def compacted(weight: Tensor) -> Tensor:
    """`[out, in]` as one block of memory; of fp32 on a CPU, with its longer side in a row.

    The product of one token is bound by reading the weight, which goes up to 1.8 times as fast along long rows; that of
    many is not, nor is one in 16 bits.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.shape[0] > weight.shape[1]:
        return weight.t().contiguous().t()
    return weight.contiguous()


class _Plain:
    """One matrix, possibly with rows that lie apart."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class _Block:
    """A view `[loop, batch, rows, in]` (rows grouped) or `[loop, batch, out, columns]` (columns grouped) of a weight.

    `strides`, `offset`: where `[loop, batch, units]` of it stand among the child's packed units.
    """

    weight: Tensor
    strides: tuple[int, ...]
    offset: int

    def of(self, packed: Tensor, units: int) -> Tensor:
        """`[loop, batch, t, units]` of a contiguous `[t, all]`."""
        loop, batch = self.weight.shape[:2]
        size, strides = (loop, batch, packed.shape[0], units), (*self.strides[:2], packed.shape[1], self.strides[2])
        return packed.as_strided(size, strides, packed.storage_offset() + self.offset)


@dataclass(frozen=True)
class Affine:
    """`(linear(x) + bias) * scale`; None and 1: neither."""

    linear: Linear
    bias: Tensor | None
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = y if self.bias is None else y + self.bias
        return y if self.scale == 1.0 else y * self.scale


class _GroupedRows:
    """Rows (outputs) in groups: one batched product a block, put where the child's packed output has it."""

    def __init__(self, parts: list[_Block], out: int) -> None:
        self.parts, self.out = parts, out

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat.new_empty(flat.shape[0], self.out)
        for part in self.parts:
            loop, batch, rows, _ = part.weight.shape
            into = part.of(y, rows)
            for number in range(loop):
                wide = flat.expand(batch, *flat.shape)
                into[number].copy_(torch.bmm(wide, part.weight[number].transpose(1, 2)))
        return y.view(*x.shape[:-1], self.out)


class _GroupedColumns:
    """Columns (inputs) in groups: one batched product a block, summed over the groups."""

    def __init__(self, parts: list[_Block], inputs: int) -> None:
        self.parts, self.inputs = parts, inputs

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.inputs).contiguous()
        y: Tensor | None = None
        for part in self.parts:
            of_input = part.of(flat, part.weight.shape[3])
            for number in range(part.weight.shape[0]):
                found = torch.bmm(of_input[number], part.weight[number].transpose(1, 2)).sum(0)
                y = found if y is None else y.add_(found)
        assert y is not None
        return y.view(*x.shape[:-1], -1)


def _blocks(weight: Tensor, axis: Axis, sizes: Mapping[str, int], at: int, extent: int) -> list[_Block]:
    """The views of `weight`, whose `axis` stands at dim `at`, beside those of a packed `[extent]`."""
    packed = weight.new_empty(extent)
    found = []
    of_child = blocks(packed, axis, sizes, 0, whole=False)
    for view, target in zip(blocks(weight, axis, sizes, at, whole=True), of_child, strict=True):
        if at == 0:  # [units..., in] -> [in, units...]
            view = view.movedim(-1, 0)
        shape, weight_strides, strides = _merged(view.shape[1:], view.stride()[1:], target.stride())
        assert len(shape) == 3, "more than three runs of units cannot lie in one block"
        rest, step = view.shape[0], view.stride(0)
        if at == 0:  # [loop, batch, units, in]
            size, stride = (*shape, rest), (*weight_strides, step)
        else:  # [loop, batch, out, units]
            size, stride = (*shape[:2], rest, shape[2]), (*weight_strides[:2], step, weight_strides[2])
        lies = weight.as_strided(size, stride, view.storage_offset())
        found.append(_Block(lies, strides, target.storage_offset()))
    return found


def _merged(
    shape: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Dims of extent 1 dropped and neighbours that are one run for both stride tuples joined; 3 dims, led by ones."""
    runs: list[list[int]] = []
    for extent, a, b in zip(shape, first, second, strict=True):
        if extent == 1:
            continue
        if runs and runs[-1][1] == a * extent and runs[-1][2] == b * extent:
            runs[-1] = [runs[-1][0] * extent, a, b]
        else:
            runs.append([extent, a, b])
    runs = [[1, 0, 0]] * (3 - len(runs)) + runs
    return tuple(r[0] for r in runs), tuple(r[1] for r in runs), tuple(r[2] for r in runs)
