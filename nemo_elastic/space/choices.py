"""What is left to choose in a space, and a choice of it: per elastic dim one index into its choices per row.

A dim has one row, or one per parent layer of its kind when it is `per_layer`; index 0 is the parent's size (choices
descend). The router's outputs, the search and the repair all speak of a `Selection`; `subnet_of` turns it into the
`Subnet` that everything else understands. No torch here.
"""

from collections.abc import Mapping

from .dims import DEPTH, DIMS, KIND_OF_DIM, PER_LAYER_DIMS
from .elastic_space import ElasticSpace
from .subnet import Subnet

Selection = Mapping[str, tuple[int, ...]]


def choice_shapes(space: ElasticSpace) -> dict[str, tuple[int, int]]:
    """dim -> (rows, choices) of every dim that has something to choose."""
    shapes = {}
    for name in DIMS:
        dim = space.dims[name]
        layers = layers_of_dim(space, name)
        if len(dim.choices) > 1 and layers:
            shapes[name] = (len(layers) if dim.per_layer else 1, len(dim.choices))
    return shapes


def layers_of_dim(space: ElasticSpace, name: str) -> tuple[int, ...]:
    """Parent layers whose tensors a dim cuts, ascending."""
    if name in KIND_OF_DIM:
        return space.architecture.layers_of(KIND_OF_DIM[name])
    return tuple(range(space.architecture.num_layers))


def full_selection(space: ElasticSpace) -> Selection:
    """The parent."""
    return {name: (0,) * rows for name, (rows, _) in choice_shapes(space).items()}


def smallest_selection(space: ElasticSpace) -> Selection:
    """The smallest choice everywhere."""
    return {name: (choices - 1,) * rows for name, (rows, choices) in choice_shapes(space).items()}


def subnet_of(space: ElasticSpace, selection: Selection) -> Subnet:
    """The subnet a selection names; depth goes through the ranking."""
    sizes = {}
    for name, row in selection.items():
        chosen = tuple(space.dims[name].choices[i] for i in row)
        sizes[name] = chosen if len(chosen) > 1 else chosen[0]
    return space.subnet(**sizes)


def selection_of(space: ElasticSpace, subnet: Subnet) -> Selection | None:
    """The selection that names `subnet`; None when a size is no choice or the layers are not the ranking's first."""
    found = {}
    for name, (rows, _) in choice_shapes(space).items():
        value = getattr(subnet, name)
        row = value if isinstance(value, tuple) else (value,)
        if (rows == 1 and len(set(row)) > 1) or any(size not in space.dims[name].choices for size in row):
            return None
        found[name] = tuple(space.dims[name].choices.index(size) for size in row[:rows])
    return found if subnet_of(space, found) == subnet else None


def is_row_per_layer(space: ElasticSpace, name: str) -> bool:
    """True when the rows of a dim are its layers (a kind with a single layer counts as one row either way)."""
    return name in PER_LAYER_DIMS and space.dims[name].per_layer


def kept_by_depth(space: ElasticSpace) -> tuple[tuple[int, ...], ...]:
    """Kept layers per choice of depth."""
    return tuple(space.kept_layers(n) for n in space.dims[DEPTH].choices)
