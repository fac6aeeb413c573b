"""One subnet of a space: its kept layers and sizes, and what every layer keeps. No torch here."""

from dataclasses import dataclass, make_dataclass
from typing import Any

from ..kinds import dims as dims_of_kinds
from ..kinds import kinds_by_dim
from .architecture import Architecture
from .dims import (
    DEPTH,
    HIDDEN,
    KIND_OF_DIM,
    PER_LAYER_DIMS,
    WIDTH_DIMS,
)

_Widths = make_dataclass(
    "_Widths",
    [(HIDDEN, int), *((dim.name, tuple[int, ...] if dim.per_layer else int) for dim in dims_of_kinds())],
    frozen=True,
)


@dataclass(frozen=True)
class Subnet(_Widths):
    """One child: a size per width dim and the kept layers of the parent (global indices, ascending).

    A field for each of `WIDTH_DIMS`. One of `PER_LAYER_DIMS` is a tuple with one size per parent layer OF ITS KIND, in
    parent order (dropped layers have an entry too, so that a subnet means the same whatever is dropped); the others are
    ints.
    """

    layers: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def is_nested_in(self, larger: "Subnet") -> bool:
        """True when every unit and layer of this subnet is also in `larger`."""
        widths = all(
            a <= b for name in WIDTH_DIMS for a, b in zip(row_of(self, name), row_of(larger, name), strict=True)
        )
        return widths and set(self.layers) <= set(larger.layers)

    def is_uniform(self, name: str) -> bool:
        """True when all layers have the same size in this dim."""
        return len(set(row_of(self, name))) <= 1

    def _of_absent_kinds(self) -> set[str]:
        """Dims of kinds none of whose dims has a layer's size."""
        found = set()
        for kind in kinds_by_dim():
            per_layer = [dim.name for dim in kind.dims if dim.per_layer]
            if per_layer and not any(row_of(self, name) for name in per_layer):
                found |= {dim.name for dim in kind.dims}
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON form: uniform tuples collapse to one integer, dims of kinds without a layer are left out."""
        values = {
            n: row_of(self, n)[0] if self.is_uniform(n) else list(row_of(self, n))
            for n in WIDTH_DIMS
            if row_of(self, n) and n not in self._of_absent_kinds()
        }
        return {**values, DEPTH: self.num_layers, "layers": list(self.layers)}


def row_of(subnet: Subnet, name: str) -> tuple[int, ...]:
    value = getattr(subnet, name)
    return value if isinstance(value, tuple) else (value,)


def layer_sizes(architecture: Architecture, subnet: Subnet, layer: int) -> dict[str, int]:
    """Sizes that rule one PARENT layer of a subnet: dim name -> kept units."""
    kind = architecture.hybrid_override_pattern[layer]
    position = architecture.hybrid_override_pattern[:layer].count(kind)
    sizes = {HIDDEN: subnet.hidden_size}
    for name, of_kind in KIND_OF_DIM.items():
        if of_kind == kind:
            row = row_of(subnet, name)
            sizes[name] = row[position] if name in PER_LAYER_DIMS else row[0]
    return sizes
