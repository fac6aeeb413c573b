"""Elastic dims: their names, their groups, and the sizes that are legal.

Every elastic dim is `groups` groups of equally many units; a child keeps the first k units of EVERY group
(METHOD section 1), so sizes are legal when they are multiples of the number of groups. No torch here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ..kinds import dims as dims_of_kinds
from ..kinds import kind_of_dim
from ..kinds.axis import Groups
from ..problems import Problem, nearest_multiples, raise_if_any
from .architecture import Architecture

HIDDEN, DEPTH = "hidden_size", "num_layers"
WIDTH_DIMS = (HIDDEN, *(dim.name for dim in dims_of_kinds()))
DIMS = (*WIDTH_DIMS, DEPTH)
KIND_OF_DIM = {dim.name: kind_of_dim(dim.name).letter for dim in dims_of_kinds()}  # dim -> letter of its layers
PER_LAYER_DIMS = tuple(dim.name for dim in dims_of_kinds() if dim.per_layer)
# Ranked over the layer, then dealt to groups -> the field of `elastic` that says how many.
DEALT_DIMS = {dim.name: dim.dealt for dim in dims_of_kinds() if dim.dealt}
WITHIN = {dim.name: dim.within for dim in dims_of_kinds() if dim.within}  # an order for each unit of another dim
DEFAULT_FFN_GROUPS = 8


def dim_groups(
    architecture: Architecture, ffn_groups: int | Groups = DEFAULT_FFN_GROUPS, depth_unit: int = 1
) -> dict[str, int]:
    """Number of groups whose first units a child keeps, per dim. A size must be a multiple of it.

    Args:
        depth_unit: layers that depth drops as one (`blocks`).
    """
    groups = Groups.of(ffn_groups)
    of_kinds = {dim.name: dim.groups(architecture, groups) for dim in dims_of_kinds()}
    return {HIDDEN: 1, **of_kinds, DEPTH: depth_unit}


@dataclass(frozen=True, kw_only=True)
class ElasticDim:
    """One elastic dim: the parent's size and the legal sizes (`choices`, descending, the parent's size first).

    `per_layer` lets every layer of the dim's kind have a size of its own; no child has less than `least`.
    """

    name: str
    full: int
    groups: int
    choices: tuple[int, ...]
    per_layer: bool = False
    least: int = 1

    def __post_init__(self) -> None:
        key, found = f"elastic.dims.{self.name}", []
        for size in self.choices:
            if not self.least <= size <= self.full:
                rule = f"must be between {self.least} and the parent's {self.full}"
                found.append(Problem(f"{key}.choices", f"{size} {rule}"))
            elif size % self.groups:
                near = nearest_multiples(size, self.groups, self.full)
                found.append(Problem(f"{key}.choices", f"{size} must be a multiple of {self.groups}; nearest: {near}"))
        if self.per_layer and self.name not in PER_LAYER_DIMS:
            words = f"true, but {self.name} has one value per net; per layer may be: {', '.join(PER_LAYER_DIMS)}"
            found.append(Problem(f"{key}.per_layer", words))
        raise_if_any(found)
        object.__setattr__(self, "choices", tuple(sorted({*self.choices, self.full}, reverse=True)))


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def parent_size(architecture: Architecture, name: str) -> int:
    """The parent's size of an elastic dim."""
    return getattr(architecture, name)


def present_dims(architecture: Architecture) -> tuple[str, ...]:
    """The width dims that a parent has units of."""
    return tuple(
        name
        for name in WIDTH_DIMS
        if name not in KIND_OF_DIM or (architecture.layers_of(KIND_OF_DIM[name]) and parent_size(architecture, name))
    )


def score_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """Of the scores, and of the order, of a dim's units in a layer."""
    outer = (parent_size(architecture, WITHIN[name]),) if name in WITHIN else ()
    return (*outer, parent_size(architecture, name))


def least_size(architecture: Architecture, name: str) -> int:
    """The smallest size of a child in a dim: its top-k of experts, 0 of what the parent has none of, else 1."""
    own = next((dim.least(architecture) for dim in dims_of_kinds() if dim.name == name), 1)
    return min(own, parent_size(architecture, name))


def resolve_choices(
    name: str, wanted: Iterable[int | float], full: int, step: int
) -> tuple[tuple[int, ...], list[str]]:
    """Integers as they are, ratios (floats up to 1.0) rounded ONCE to the nearest multiple of `step` (METHOD trap 7).

    1.0 is the parent's size, whatever the step; no ratio exceeds it. Returns the sizes and one note per rounded ratio.
    """
    sizes, notes, found = [], [], []
    for value in wanted:
        if isinstance(value, bool) or not isinstance(value, int | float):
            found.append(Problem(f"elastic.dims.{name}.choices", f"{value!r} must be an integer or a ratio (0 to 1)"))
        elif isinstance(value, int):
            sizes.append(value)
        elif 0 < value <= 1:
            size = full if value == 1 else min(max(1, round(value * full / step)), full // step) * step
            if abs(size - value * full) > 1e-6:
                notes.append(f"{name}: ratio {value} of {full} rounded to {size} (multiple of {step})")
            sizes.append(size)
        else:
            found.append(Problem(f"elastic.dims.{name}.choices", f"{value} as a ratio must be above 0 and at most 1"))
    raise_if_any(found)
    return tuple(sizes), notes
