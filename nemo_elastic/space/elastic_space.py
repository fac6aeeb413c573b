"""The space of one parent's children: which subnets are legal, and how a subnet is made of sizes.

A smaller choice is always a subset of a larger one; depth keeps the first n layers of a ranking. No torch here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..kinds.axis import Groups
from ..problems import Problem, did_you_mean, nearest_multiples, raise_if_any
from .architecture import Architecture
from .blocks import block_problems, units_of
from .dims import (
    DEALT_DIMS,
    DEFAULT_FFN_GROUPS,
    DEPTH,
    DIMS,
    KIND_OF_DIM,
    PER_LAYER_DIMS,
    WIDTH_DIMS,
    ElasticDim,
    dim_groups,
    is_integer,
    least_size,
    parent_size,
)
from .subnet import Subnet, row_of


@dataclass(frozen=True, kw_only=True)
class ElasticSpace:
    """All legal subnets of one parent.

    `depth_ranking` lists layers from most to least important; a child of n layers keeps its first n. Without one
    (before `rank` has run) an even thinning is assumed and `depth_is_assumed` says so. `depth_unit` layers are dropped
    as one (`blocks`).
    """

    architecture: Architecture
    dims: Mapping[str, ElasticDim] = field(default_factory=dict)
    ffn_groups: int = DEFAULT_FFN_GROUPS
    expert_groups: int | None = None  # as many as of neurons
    depth_ranking: tuple[int, ...] | None = None
    depth_unit: int = 1

    def __post_init__(self) -> None:
        arch, found = self.architecture, []
        own = dim_groups(arch, self.groups)
        for name, field_name in DEALT_DIMS.items():
            if arch.layers_of(KIND_OF_DIM[name]) and parent_size(arch, name) % own[name]:
                rule = f"must divide model.{name}={parent_size(arch, name)}"
                if getattr(self, field_name) is None:
                    field_name, rule = "ffn_groups", f"{rule}, or elastic.{field_name} must be given"
                found.append(Problem(f"elastic.{field_name}", f"{own[name]} {rule}"))
        if self.depth_ranking is not None and sorted(self.depth_ranking) != list(range(arch.num_layers)):
            found.append(Problem("depth_ranking", f"must name each of the {arch.num_layers} layers once"))
        found += block_problems(arch.hybrid_override_pattern) if self.depth_unit > 1 else []
        raise_if_any(found)
        if self.depth_ranking is not None and not self._whole_units(self.depth_ranking):
            words = f"must list the {self.depth_unit} layers of a block one after the other; rank again"
            raise_if_any([Problem("depth_ranking", words)])
        groups = dim_groups(arch, self.groups, self.depth_unit)
        every = {
            n: self.dims.get(n)
            or ElasticDim(name=n, full=parent_size(arch, n), groups=groups[n], choices=(), least=least_size(arch, n))
            for n in DIMS
        }
        object.__setattr__(self, "dims", every)

    @property
    def groups(self) -> Groups:
        """Of neurons and of experts."""
        return Groups(self.ffn_groups, self.expert_groups or self.ffn_groups)

    @property
    def depth_is_assumed(self) -> bool:
        return self.depth_ranking is None

    def kept_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers a child of `num_layers` keeps, ascending."""
        ranking = self.depth_ranking or even_thinning(self.architecture, self.depth_unit)
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
            wrong = dict.fromkeys(repr(n) for n in row if not is_integer(n))
            found += [Problem(name, f"{n} must be an integer") for n in wrong]
        depth, layers = sizes.get(DEPTH), sizes.get("layers")
        if depth is not None and not (is_integer(depth) and 0 < depth <= arch.num_layers):
            found.append(Problem(DEPTH, f"{depth!r} must be an integer between 1 and the parent's {arch.num_layers}"))
            depth = None
        elif depth is not None and depth % self.depth_unit:
            near = nearest_multiples(depth, self.depth_unit, arch.num_layers)
            found.append(
                Problem(DEPTH, f"{depth} must be a multiple of {self.depth_unit}, whole blocks; nearest: {near}")
            )
            depth = None
        if layers is None:
            layers = self.kept_layers(arch.num_layers if depth is None else depth)
        elif not isinstance(layers, Sequence) or not all(map(is_integer, layers)):
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
            row, full, groups = row_of(subnet, name), parent_size(arch, name), self.dims[name].groups
            least = least_size(arch, name)
            if name in PER_LAYER_DIMS and len(row) != len(arch.layers_of(KIND_OF_DIM[name])):
                count = len(arch.layers_of(KIND_OF_DIM[name]))
                found.append(Problem(name, f"{len(row)} sizes given, the parent has {count} such layers"))
                continue
            for size in dict.fromkeys(row):
                if not least <= size <= full:
                    found.append(Problem(name, f"{size} must be between {least} and the parent's {full}"))
                elif size % groups:
                    near = nearest_multiples(size, groups, full)
                    found.append(Problem(name, f"{size} must be a multiple of {groups}; nearest: {near}"))
        layers = subnet.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= arch.num_layers:
            found.append(
                Problem("layers", f"{list(layers)} must be one or more ascending layer numbers below {arch.num_layers}")
            )
        elif not self._whole_units(layers):
            found.append(Problem("layers", f"{list(layers)} must be whole blocks: layers 0 and 1, 2 and 3, ..."))
        return found

    def _whole_units(self, layers: Sequence[int]) -> bool:
        """Whether `layers`, taken `depth_unit` at a time, are the layers of one unit each."""
        unit = self.depth_unit
        runs = [{layer // unit for layer in layers[at : at + unit]} for at in range(0, len(layers), unit)]
        return len(layers) % unit == 0 and all(len(run) == 1 for run in runs)


def even_thinning(architecture: Architecture, depth_unit: int = 1) -> tuple[int, ...]:
    """A data-free ranking: first and last layers stay longest, what goes is spread evenly over depth and kinds.

    Only a stand-in for planning; `rank` measures the real one.
    """
    n = architecture.num_layers // depth_unit

    def bit_reversal(i: int) -> float:
        place, value = 0.5, 0.0
        while i:
            value, place, i = value + place * (i & 1), place / 2, i >> 1
        return value

    inner = sorted(range(1, n - 1), key=bit_reversal)
    units = units_of(architecture.num_layers, depth_unit)
    return tuple(layer for unit in (*dict.fromkeys((0, n - 1)), *inner) for layer in units[unit])
