"""What may vary: elastic dims, the space they span, one subnet of it, and the budget a subnet has to meet.

Every elastic dim is `groups` groups of equally many units; a child keeps the first k units of EVERY group
(METHOD section 1), so sizes are legal when they are multiples of the number of groups, and a smaller choice is
always a subset of a larger one. Depth keeps the first n layers of a ranking. No torch here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from numbers import Integral
from typing import Any

from ..kinds import dims as dims_of_kinds
from ..kinds import kind_of_dim
from ..problems import Problem, ProblemsError, did_you_mean, nearest_multiples, raise_if_any
from .architecture import Architecture

HIDDEN, DEPTH = "hidden_size", "num_layers"
WIDTH_DIMS = (HIDDEN, *(dim.name for dim in dims_of_kinds()))
DIMS = (*WIDTH_DIMS, DEPTH)
KIND_OF_DIM = {dim.name: kind_of_dim(dim.name).letter for dim in dims_of_kinds()}  # dim -> letter of its layers
PER_LAYER_DIMS = tuple(dim.name for dim in dims_of_kinds() if dim.per_layer)
DEALT_DIMS = tuple(dim.name for dim in dims_of_kinds() if dim.dealt)  # ranked over the layer, then dealt to groups
DEFAULT_FFN_GROUPS = 8


def dim_groups(architecture: Architecture, ffn_groups: int = DEFAULT_FFN_GROUPS) -> dict[str, int]:
    """Number of groups whose first units a child keeps, per dim. A size must be a multiple of it."""
    return {HIDDEN: 1, **{dim.name: dim.groups(architecture, ffn_groups) for dim in dims_of_kinds()}, DEPTH: 1}


@dataclass(frozen=True, kw_only=True)
class ElasticDim:
    """One elastic dim: the parent's size and the legal sizes (`choices`, descending, the parent's size first).

    `per_layer` lets every layer of the dim's kind have a size of its own.
    """

    name: str
    full: int
    groups: int
    choices: tuple[int, ...]
    per_layer: bool = False

    def __post_init__(self) -> None:
        key, found = f"elastic.dims.{self.name}", []
        for size in self.choices:
            if not 0 < size <= self.full:
                found.append(Problem(f"{key}.choices", f"{size} must be between 1 and the parent's {self.full}"))
            elif size % self.groups:
                near = nearest_multiples(size, self.groups, self.full)
                found.append(Problem(f"{key}.choices", f"{size} must be a multiple of {self.groups}; nearest: {near}"))
        if self.per_layer and self.name not in PER_LAYER_DIMS:
            words = f"true, but {self.name} has one value per net; per layer may be: {', '.join(PER_LAYER_DIMS)}"
            found.append(Problem(f"{key}.per_layer", words))
        raise_if_any(found)
        object.__setattr__(self, "choices", tuple(sorted({*self.choices, self.full}, reverse=True)))


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
        widths = all(a <= b for name in WIDTH_DIMS for a, b in zip(_row(self, name), _row(larger, name), strict=True))
        return widths and set(self.layers) <= set(larger.layers)

    def is_uniform(self, name: str) -> bool:
        """True when all layers have the same size in this dim."""
        return len(set(_row(self, name))) <= 1

    def to_dict(self) -> dict[str, Any]:
        """JSON form: uniform tuples collapse to one integer."""
        values = {
            n: (_row(self, n)[0] if self.is_uniform(n) and _row(self, n) else list(_row(self, n))) for n in WIDTH_DIMS
        }
        return {**values, DEPTH: self.num_layers, "layers": list(self.layers)}


def _row(subnet: Subnet, name: str) -> tuple[int, ...]:
    value = getattr(subnet, name)
    return value if isinstance(value, tuple) else (value,)


PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def name_problems(name: str, key: str = "elastic.budgets") -> list[Problem]:
    """Why `name` is no name for a budget: folders, files and columns are called by it."""
    if PLAIN_WORD.fullmatch(name):
        return []
    words = f"{name!r} is no name for a budget: a folder is called by it; use up to 64 letters, digits and . _ + -, "
    return [Problem(key, words + "with a letter or digit first")]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a child may cost, `value` in units of `kind`: `fraction` (of the parent's parameters) or one of KINDS.

    `active_parameters` are those that one token passes through: all of them without a mixture of experts.
    """

    name: str
    kind: str
    value: float

    KINDS = ("fraction", "parameters", "active_parameters", "memory_gb", "latency_ms")

    def __post_init__(self) -> None:
        key = f"elastic.budgets.{self.name}"
        raise_if_any(name_problems(self.name))
        if self.kind not in self.KINDS:
            raise ProblemsError([Problem(key, f"kind {self.kind!r} must be one of {', '.join(self.KINDS)}")])
        if not self.value > 0 or (self.kind == "fraction" and self.value > 1):
            rule = "must be above 0 and at most 1" if self.kind == "fraction" else "must be above 0"
            raise ProblemsError([Problem(key, f"{self.value} {rule} (a {self.kind} budget)")])

    @property
    def is_full(self) -> bool:
        """The parent itself: pinned to the full network, never learned (METHOD section 9)."""
        return self.kind == "fraction" and self.value == 1.0


@dataclass(frozen=True, kw_only=True)
class ElasticSpace:
    """All legal subnets of one parent.

    `depth_ranking` lists layers from most to least important; a child of n layers keeps its first n. Without one
    (before `rank` has run) an even thinning is assumed and `depth_is_assumed` says so.
    """

    architecture: Architecture
    dims: Mapping[str, ElasticDim] = field(default_factory=dict)
    ffn_groups: int = DEFAULT_FFN_GROUPS
    depth_ranking: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        arch, found = self.architecture, []
        if arch.ffn_hidden_size % self.ffn_groups:
            rule = f"must divide model.ffn_hidden_size={arch.ffn_hidden_size}"
            found.append(Problem("elastic.ffn_groups", f"{self.ffn_groups} {rule}"))
        if self.depth_ranking is not None and sorted(self.depth_ranking) != list(range(arch.num_layers)):
            found.append(Problem("depth_ranking", f"must name each of the {arch.num_layers} layers once"))
        raise_if_any(found)
        groups = dim_groups(arch, self.ffn_groups)
        every = {
            n: self.dims.get(n) or ElasticDim(name=n, full=parent_size(arch, n), groups=groups[n], choices=())
            for n in DIMS
        }
        object.__setattr__(self, "dims", every)

    @property
    def depth_is_assumed(self) -> bool:
        return self.depth_ranking is None

    def kept_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers a child of `num_layers` keeps, ascending."""
        ranking = self.depth_ranking or even_thinning(self.architecture)
        return tuple(sorted(ranking[:num_layers]))

    def subnet(self, **sizes: Any) -> Subnet:
        """A subnet from sizes by dim (int, or one per layer of the dim's kind); what is not named stays full.

        `layers=` gives kept layers explicitly, `num_layers=` by the ranking.

        Raises:
            ProblemsError: with every illegal or unknown value.
        """
        arch, values, found = self.architecture, {}, []
        for name in sorted(set(sizes) - {*DIMS, "layers"}):
            found.append(Problem(name, f"no elastic dim{did_you_mean(name, (*DIMS, 'layers'))}"))
        for name in WIDTH_DIMS:
            size = sizes.get(name, parent_size(arch, name))
            if name in PER_LAYER_DIMS and isinstance(size, Sequence) and not isinstance(size, str):
                values[name] = tuple(size)
            else:
                values[name] = (size,) * len(arch.layers_of(KIND_OF_DIM[name])) if name in PER_LAYER_DIMS else size
            row = values[name] if isinstance(values[name], tuple) else (values[name],)
            wrong = dict.fromkeys(repr(n) for n in row if not _is_integer(n))
            found += [Problem(name, f"{n} must be an integer") for n in wrong]
        depth, layers = sizes.get(DEPTH), sizes.get("layers")
        if depth is not None and not (_is_integer(depth) and 0 < depth <= arch.num_layers):
            found.append(Problem(DEPTH, f"{depth!r} must be an integer between 1 and the parent's {arch.num_layers}"))
            depth = None
        if layers is None:
            layers = self.kept_layers(arch.num_layers if depth is None else depth)
        elif not isinstance(layers, Sequence) or not all(map(_is_integer, layers)):
            found.append(Problem("layers", f"{layers!r} must be a list of layer numbers"))
        elif depth is not None and depth != len(layers):
            found.append(Problem(DEPTH, f"{depth} given, but {len(layers)} layers are listed; leave one out"))
        raise_if_any(found)
        exact = {n: tuple(map(int, v)) if isinstance(v, tuple) else int(v) for n, v in values.items()}
        subnet = Subnet(**exact, layers=tuple(map(int, layers)))
        raise_if_any(self.problems(subnet))
        return subnet

    def full_subnet(self) -> Subnet:
        """The parent, as a subnet."""
        return self.subnet()

    def subnet_from_dict(self, values: Mapping[str, Any]) -> Subnet:
        """Inverse of `Subnet.to_dict`, checked against this space."""
        return self.subnet(**values)

    def problems(self, subnet: Subnet) -> list[Problem]:
        """Every rule of the groups that `subnet` breaks. (Choices are what a router picks from, not a limit here.)"""
        arch, found = self.architecture, []
        for name in WIDTH_DIMS:
            row, full, groups = _row(subnet, name), parent_size(arch, name), self.dims[name].groups
            if name in PER_LAYER_DIMS and len(row) != len(arch.layers_of(KIND_OF_DIM[name])):
                count = len(arch.layers_of(KIND_OF_DIM[name]))
                found.append(Problem(name, f"{len(row)} sizes given, the parent has {count} such layers"))
                continue
            for size in dict.fromkeys(row):
                if not 0 < size <= full:
                    found.append(Problem(name, f"{size} must be between 1 and the parent's {full}"))
                elif size % groups:
                    near = nearest_multiples(size, groups, full)
                    found.append(Problem(name, f"{size} must be a multiple of {groups}; nearest: {near}"))
        layers = subnet.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= arch.num_layers:
            found.append(
                Problem("layers", f"{list(layers)} must be one or more ascending layer numbers below {arch.num_layers}")
            )
        return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def parent_size(architecture: Architecture, name: str) -> int:
    """The parent's size of an elastic dim."""
    return getattr(architecture, name)


def layer_sizes(architecture: Architecture, subnet: Subnet, layer: int) -> dict[str, int]:
    """Sizes that rule one PARENT layer of a subnet: dim name -> kept units."""
    kind = architecture.hybrid_override_pattern[layer]
    position = architecture.hybrid_override_pattern[:layer].count(kind)
    sizes = {HIDDEN: subnet.hidden_size}
    for name, of_kind in KIND_OF_DIM.items():
        if of_kind == kind:
            row = _row(subnet, name)
            sizes[name] = row[position] if name in PER_LAYER_DIMS else row[0]
    return sizes


def even_thinning(architecture: Architecture) -> tuple[int, ...]:
    """A data-free ranking: first and last layers stay longest, what goes is spread evenly over depth and kinds.

    Only a stand-in for planning; `rank` measures the real one.
    """
    n = architecture.num_layers

    def bit_reversal(i: int) -> float:
        place, value = 0.5, 0.0
        while i:
            value, place, i = value + place * (i & 1), place / 2, i >> 1
        return value

    inner = sorted(range(1, n - 1), key=bit_reversal)
    return (*dict.fromkeys((0, n - 1)), *inner)


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
