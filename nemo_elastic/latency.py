"""A measured latency table: milliseconds per layer kind and size on one machine, interpolated between measured sizes.

Between grid points the value is multilinear; outside the measured range it is refused, never extrapolated.
`nemo-elastic profile` writes the table. No torch here.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .problems import Problem, ProblemsError

OUTER = "embedding_and_output"


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
    """One grid per layer kind (`mamba`, `attention`, `mlp`) and one for what lies outside the stack."""

    grids: Mapping[str, Grid]

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

    def to_json(self) -> str:
        """The file form."""
        return json.dumps({k: {"dims": g.dims, "sizes": g.sizes, "values": g.values} for k, g in self.grids.items()})

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """Inverse of `to_json`."""
        return cls(
            {
                kind: Grid(tuple(g["dims"]), tuple(map(tuple, g["sizes"])), tuple(g["values"]))
                for kind, g in json.loads(text).items()
            }
        )

    @classmethod
    def read(cls, path: str | Path) -> "LatencyTable":
        """A table that `profile` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
