"""A measured latency table: milliseconds per layer kind and size on one machine, interpolated between measured sizes.

    latency(child) = outer(hidden) + sum over kept layers of layer(kind, sizes)

Between grid points the value is multilinear; outside the measured range it is refused, never extrapolated.
`nemo-elastic profile` writes the table as YAML: which machine, which conditions, which parent, and a hash of the
numbers, so that a table says what it is and a damaged one is noticed. No torch here.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from ..files import read_yaml, write_text
from ..problems import Problem, ProblemsError
from ..space.architecture import Architecture
from ..space.dims import WIDTH_DIMS

OUTER = "embedding_and_output"
FORMAT, VERSION = "nemo_elastic.latency", 1
FREE_OF = ("hybrid_override_pattern", *WIDTH_DIMS)  # what a table of one parent leaves open


@dataclass(frozen=True)
class Grid:
    """Milliseconds over the product of measured sizes: `sizes[i]` ascending per dim, `values` row-major."""

    dims: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        expected = 1
        for name, row in zip(self.dims, self.sizes, strict=True):
            if not row or list(row) != sorted(set(row)):
                raise ValueError(f"latency table: sizes of {name} must ascend without repeats, got {list(row)}")
            expected *= len(row)
        if len(self.values) != expected:
            raise ValueError(f"latency table: {expected} values expected for {self.dims}, got {len(self.values)}")
        if any(not (isfinite(v) and v > 0) for v in self.values):
            raise ValueError(f"latency table: milliseconds of {self.dims} must be positive numbers")

    def at(self, sizes: Mapping[str, int]) -> float:
        """Multilinear interpolation."""
        corners = [_bracket(name, row, sizes[name]) for name, row in zip(self.dims, self.sizes, strict=True)]
        total = 0.0
        for corner in product(*corners):
            flat, weight = 0, 1.0
            for (i, share), row in zip(corner, self.sizes, strict=True):
                flat, weight = flat * len(row) + i, weight * share
            total += weight * self.values[flat]
        return total


def _bracket(name: str, row: Sequence[int], size: int) -> tuple[tuple[int, float], ...]:
    if not row[0] <= size <= row[-1]:
        words = f"{size} was not measured ({row[0]} to {row[-1]} were); run `nemo-elastic profile` over the new range"
        raise ProblemsError([Problem(f"latency table: {name}", words)])
    right = bisect_left(row, size)
    if row[right] == size:
        return ((right, 1.0),)
    share = (size - row[right - 1]) / (row[right] - row[right - 1])
    return ((right - 1, 1 - share), (right, share))


@dataclass(frozen=True)
class LatencyTable:
    """One grid per layer kind (`mamba`, `attention`, `mlp`) and one for what lies outside the stack.

    `origin` says how it was measured: `machine`, `conditions` (batch, length, dtype, repeats) and `model`, the sizes of
    the parent that no child changes. All of it is free form but for `model`.
    """

    grids: Mapping[str, Grid]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def layer(self, kind: str, sizes: Mapping[str, int]) -> float:
        """Milliseconds of one layer."""
        return self._grid(kind).at(sizes)

    def outer(self, hidden_size: int) -> float:
        """Milliseconds of embedding, final norm and output layer."""
        return self._grid(OUTER).at({"hidden_size": hidden_size})

    def _grid(self, kind: str) -> Grid:
        if kind not in self.grids:
            raise ProblemsError([Problem("latency table", f"no {kind!r} measured; it has {', '.join(self.grids)}")])
        return self.grids[kind]

    def check_parent(self, architecture: Architecture) -> None:
        """Refuse a table that was measured for another parent.

        Raises:
            ValueError: naming the sizes that differ.
        """
        mine, theirs = fixed_sizes(architecture), self.origin.get("model", {})
        wrong = [f"{n} {theirs[n]} instead of {size}" for n, size in mine.items() if theirs.get(n, size) != size]
        if wrong:
            raise ValueError(f"it was measured for another parent: {', '.join(wrong)}")

    def describe(self) -> str:
        """Where and how it was measured, in a line."""
        machine, at = self.origin.get("machine", {}), self.origin.get("conditions", {})
        if not at:
            return "a table that does not say how it was measured"
        where = machine.get("device", "an unknown machine")
        return f"{at['batch_size']} x {at['sequence_length']:,} tokens in {at['dtype']} on {where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the hash of the numbers."""
        kinds = {
            kind: {"dims": list(g.dims), "sizes": [list(row) for row in g.sizes], "milliseconds": list(g.values)}
            for kind, g in self.grids.items()
        }
        return {"format": FORMAT, "version": VERSION, **self.origin, "kinds": kinds, "sha256": _digest(kinds)}

    def write(self, path: str | Path) -> Path:
        """Write the table whole or not at all."""
        return write_text(
            Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=118)
        )

    @classmethod
    def from_dict(cls, values: Any) -> "LatencyTable":
        """Inverse of `to_dict`.

        Raises:
            ValueError: not a table, another version, or numbers that are not those that were measured.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if values.get("version") != VERSION:
            raise ValueError(f"version {values.get('version')!r} cannot be read here, {VERSION} can")
        try:
            kinds = values["kinds"]
            grids = {
                str(kind): Grid(tuple(g["dims"]), tuple(map(tuple, g["sizes"])), tuple(map(float, g["milliseconds"])))
                for kind, g in kinds.items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is damaged: {error!r}") from error
        if values.get("sha256") != _digest(kinds):
            raise ValueError("its sha256 is not that of its numbers: damaged or edited")
        rest = {k: v for k, v in values.items() if k not in ("format", "version", "kinds", "sha256")}
        return cls(grids, rest)

    @classmethod
    def read(cls, path: str | Path) -> "LatencyTable":
        """A table that `profile` wrote.

        Raises:
            OSError, ValueError: no such file, or no table.
        """
        return cls.from_dict(read_yaml(Path(path)))


def fixed_sizes(architecture: Architecture) -> dict[str, Any]:
    """The parent's sizes that a latency depends on and that no child changes."""
    return {name: value for name, value in asdict(architecture).items() if name not in FREE_OF}


def _digest(kinds: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest()
