"""What a budget counts: one number per subnet, in the budget's own unit, and the same as tables over choices.

A cost is `outer(hidden) + sum over kept layers of layer(kind, sizes)`; all layers of a kind have the same shapes, so
one small table per kind, over the choices of the dims that cut it, holds everything there is to know. Discrete costs
are sums of entries (exact on integers), the expected cost under independent choices is the contraction of the tables
with the probabilities (exact too, for measured latencies as well as for counts). No torch here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from ..problems import Problem, ProblemsError
from ..space.architecture import KIND_NAMES
from ..space.budget import Budget
from ..space.choices import Selection, is_row_per_layer, kept_by_depth
from ..space.dims import DEPTH, KIND_OF_DIM
from ..space.elastic_space import ElasticSpace
from ..space.layout import ParamLayout
from ..space.subnet import Subnet
from .counts import (
    BYTE_PROFILES,
    ByteProfile,
    layer_active_parameters,
    layer_parameters,
    layer_state_elements,
    outer_parameters,
)
from .latency import LatencyTable

BYTES_PER_GB = 1e9
UNITS = {
    "fraction": "of the parent's parameters",
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "memory_gb": "GB",
    "latency_ms": "ms",
}
HIDDEN = "hidden_size"


@dataclass(frozen=True)
class KindTable:
    """Cost of one layer of a kind over the choices of `dims` (row-major; `hidden_size` is always the first dim)."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    values: tuple[float, ...]

    def at(self, index: tuple[int, ...]) -> float:
        flat = 0
        for i, n in zip(index, self.shape, strict=True):
            flat = flat * n + i
        return self.values[flat]


class BudgetCost:
    """The cost that one budget limits.

    Args:
        budget: its `kind` says what is counted: parameters (also for `fraction`), GB (1e9 bytes) of serving memory, or
            milliseconds of a measured table.
        batch_size, sequence_length, profile: the serving conditions of a memory budget.
        latency: the measured table; required by `latency_ms` budgets.

    Raises:
        ProblemsError: a latency budget without a table.
    """

    def __init__(
        self,
        space: ElasticSpace,
        layout: ParamLayout,
        budget: Budget,
        *,
        batch_size: int = 1,
        sequence_length: int = 8192,
        profile: ByteProfile = BYTE_PROFILES["bf16"],
        latency: LatencyTable | None = None,
    ) -> None:
        if budget.kind == "latency_ms" and latency is None:
            words = "a latency budget needs a measured table; make one with `nemo-elastic profile`"
            raise ProblemsError([Problem(f"elastic.budgets.{budget.name}", words)])
        self.space, self.layout, self.budget = space, layout, budget
        self.batch_size, self.sequence_length, self.profile, self.latency = (
            batch_size,
            sequence_length,
            profile,
            latency,
        )

    @cached_property
    def parent(self) -> float:
        """The parent's cost."""
        return self.of(self.space.full_subnet())

    @cached_property
    def target(self) -> float:
        """What a subnet may cost, in the unit of `of`."""
        return self.budget.value * self.parent if self.budget.kind == "fraction" else self.budget.value

    def layer(self, kind: str, sizes: dict[str, Any]) -> float:
        """Cost of one layer of `kind` at integer sizes."""
        if self.budget.kind == "latency_ms":
            return self.latency.layer(KIND_NAMES[kind], sizes)
        if self.budget.kind == "active_parameters":
            return layer_active_parameters(self.layout, kind, sizes)
        count = layer_parameters(self.layout, kind, sizes)
        if self.budget.kind != "memory_gb":
            return count
        elements = layer_state_elements(self.layout.architecture, kind, sizes, self.sequence_length)
        state = (elements["ssm_state"] + elements["conv_state"]) * self.profile.state
        cached = elements["kv_cache"] * self.profile.kv_cache + state
        return (count * self.profile.weights + cached * self.batch_size) / BYTES_PER_GB

    def outer(self, hidden_size: int) -> float:
        """Cost of what lies outside the stack."""
        if self.budget.kind == "latency_ms":
            return self.latency.outer(hidden_size)
        count = outer_parameters(self.layout, hidden_size)
        return count * self.profile.weights / BYTES_PER_GB if self.budget.kind == "memory_gb" else count

    def of(self, subnet: Subnet) -> float:
        """Exact cost of any subnet (an integer for parameters)."""
        pattern = self.layout.architecture.hybrid_override_pattern
        cache: dict[tuple[str, tuple[tuple[str, int], ...]], float] = {}
        total = self.outer(subnet.hidden_size)
        for i in subnet.layers:
            sizes = self.layout.sizes(subnet, i)
            key = (pattern[i], tuple(sizes.items()))
            if key not in cache:
                cache[key] = self.layer(pattern[i], sizes)
            total += cache[key]
        return total

    def error(self, cost: float) -> float:
        """Relative error of a cost: `cost / target - 1`; positive means too large."""
        return cost / self.target - 1

    def in_user_units(self, cost: float) -> float:
        """A cost as the user wrote the budget (a fraction of the parent's parameters for `fraction`)."""
        return cost / self.parent if self.budget.kind == "fraction" else cost

    def words(self, cost: float) -> str:
        """A cost with its unit, as the user wrote the budget."""
        value = self.in_user_units(cost)
        exact = self.budget.kind.endswith("parameters")
        return f"{int(value)} {UNITS[self.budget.kind]}" if exact else f"{value:.4g} {UNITS[self.budget.kind]}"

    @cached_property
    def tables(self) -> "CostTables":
        """The cost over the choices of the space."""
        return CostTables(self)


class CostTables:
    """`BudgetCost` over choices: sums of table entries, fast enough to search with."""

    def __init__(self, cost: BudgetCost) -> None:
        space = cost.space
        self.space = space
        self.outer = tuple(cost.outer(h) for h in space.dims[HIDDEN].choices)
        self.kinds: dict[str, KindTable] = {}
        for kind in KIND_NAMES:
            if not space.architecture.layers_of(kind):
                continue
            dims = (HIDDEN, *(n for n, of_kind in KIND_OF_DIM.items() if of_kind == kind))
            choices = [space.dims[n].choices for n in dims]
            values = tuple(cost.layer(kind, dict(zip(dims, sizes, strict=True))) for sizes in product(*choices))
            assert len(values) == prod(map(len, choices))
            self.kinds[kind] = KindTable(dims, tuple(map(len, choices)), values)
        self.kept = kept_by_depth(space)

    @cached_property
    def rows_kept(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Per choice of depth and kind: the positions, among the layers of the kind, of the kept layers."""
        arch = self.space.architecture
        found = []
        for kept in map(set, self.kept):
            found.append({k: tuple(r for r, i in enumerate(arch.layers_of(k)) if i in kept) for k in self.kinds})
        return tuple(found)

    def cost(self, selection: Selection) -> float:
        """Exact cost of a selection."""
        hidden = selection.get(HIDDEN, (0,))[0]
        depth = selection.get(DEPTH, (0,))[0]
        total = self.outer[hidden]
        for kind, rows in self.rows_kept[depth].items():
            table = self.kinds[kind]
            if not any(is_row_per_layer(self.space, n) and n in selection for n in table.dims):
                total += len(rows) * table.at(tuple(selection.get(n, (0,))[0] for n in table.dims))
                continue
            for row in rows:
                total += table.at(tuple(self._index(selection, n, row) for n in table.dims))
        return total

    def _index(self, selection: Selection, name: str, row: int) -> int:
        chosen = selection.get(name, (0,))
        return chosen[row] if len(chosen) > 1 else chosen[0]

    def uniform_cost(self, names: tuple[str, ...]) -> Callable[[tuple[int, ...]], float]:
        """A fast `cost` of one index per dim of `names`, the same in all rows; what is not named is the parent's."""
        place = {name: i for i, name in enumerate(names)}
        terms = []
        for kind, table in self.kinds.items():
            strides = [prod(table.shape[i + 1 :]) for i in range(len(table.shape))]
            flat = [(place[n], stride) for n, stride in zip(table.dims, strides, strict=True) if n in place]
            counts = tuple(len(rows[kind]) for rows in self.rows_kept)
            terms.append((counts, table.values, flat))
        hidden, depth = place.get(HIDDEN), place.get(DEPTH)

        def cost(picked: tuple[int, ...]) -> float:
            total = self.outer[0 if hidden is None else picked[hidden]]
            kept = 0 if depth is None else picked[depth]
            for counts, values, flat in terms:
                at = 0
                for i, stride in flat:
                    at += picked[i] * stride
                total += counts[kept] * values[at]
            return total

        return cost

    def walk(self) -> Iterator[tuple[str, KindTable]]:
        """The kinds of layer this parent has, with their tables."""
        yield from self.kinds.items()
