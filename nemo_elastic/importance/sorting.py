"""Sort a parent: permute units inside their groups so that every child is a prefix; the parent's function is unchanged.

Identity: `forward(sorted weights) == forward(weights)`, and `sort(inverse=True)` undoes `sort`. Works tensor by tensor,
so that a checkpoint of any size passes through the memory of one tensor. Whole tensors only: under tensor parallelism
dealing moves FFN neurons between ranks, so shards are gathered first (`mcore`) or the checkpoint is sorted instead.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..space.dims import score_shape
from ..space.layout import ParamLayout
from ..space.slicing import permute
from .ranking import Orders


class TensorReader(Protocol):
    """What this module needs of a checkpoint reader: whole tensors by name."""

    def names(self) -> Iterable[str]: ...

    def read(self, name: str) -> Tensor: ...


def sort_tensor(name: str, tensor: Tensor, layout: ParamLayout, orders: Orders, *, inverse: bool = False) -> Tensor:
    """One whole parameter, any of its names, with its units in order.

    Raises:
        ValueError: when the table has no row for `name`, or `tensor` is not the whole parameter.
    """
    spec = layout.spec(name)
    if layout.tp_size != 1 or tuple(tensor.shape) != spec.shape({}):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, sorting needs the whole parameter {spec.shape({})}: "
            "gather tensor-parallel shards first, or sort the checkpoint"
        )
    return permute(tensor, spec, orders[spec.layer], inverse=inverse)


def sort_tensors(
    tensors: Iterable[tuple[str, Tensor]], layout: ParamLayout, orders: Orders, *, inverse: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """`sort_tensor` over a stream of (name, whole tensor); holds one tensor at a time."""
    for name, tensor in tensors:
        yield name, sort_tensor(name, tensor, layout, orders, inverse=inverse)


def sort_reader(
    reader: TensorReader, layout: ParamLayout, orders: Orders, *, inverse: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """`sort_tensors` over all of a reader."""
    return sort_tensors(((name, reader.read(name)) for name in reader.names()), layout, orders, inverse=inverse)


class SortedReader:
    """A reader whose tensors are those of `reader`, sorted when they are read."""

    def __init__(self, reader: TensorReader, layout: ParamLayout, orders: Orders, *, inverse: bool = False) -> None:
        self.reader, self.layout, self.orders, self.inverse = reader, layout, orders, inverse

    def names(self) -> Iterable[str]:
        return self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.layout.spec(name).shape({}))

    def read(self, name: str) -> Tensor:
        return sort_tensor(name, self.reader.read(name), self.layout, self.orders, inverse=self.inverse)


def orders_to_tensors(orders: Orders) -> dict[str, Tensor]:
    """Flat form for a manifest: `outside.hidden_size`, `<layer>.<dim>` -> int64 order. Hidden is written once."""
    flat = {f"outside.{dim}": order for dim, order in orders[None].items()}
    for layer, by_dim in orders.items():
        if layer is not None:
            flat.update({f"{layer}.{dim}": order for dim, order in by_dim.items() if dim not in orders[None]})
    return {name: order.to(torch.int64).contiguous() for name, order in flat.items()}


def orders_from_tensors(flat: Mapping[str, Tensor], layout: ParamLayout) -> Orders:
    """Inverse of `orders_to_tensors`.

    Raises:
        ValueError: when an entry is no permutation of its dim's units.
    """
    shared = {name.split(".", 1)[1]: order for name, order in flat.items() if name.startswith("outside.")}
    orders: Orders = {None: dict(shared), **{i: dict(shared) for i in range(layout.architecture.num_layers)}}
    for name, order in flat.items():
        layer, dim = name.split(".", 1)
        shape = score_shape(layout.architecture, dim)
        if order.shape != shape or not torch.equal(order.sort(-1).values, torch.arange(shape[-1]).expand(shape)):
            raise ValueError(f"order {name} is no permutation of the {shape[-1]} units of {dim}")
        if layer != "outside":
            orders[int(layer)][dim] = order
    return orders
