"""Which source sample `i` of a blend comes from: a pure function of (weights, seed, i), with exact frequencies.

Weights become whole shares c_1 .. c_K of a period P = sum c_k. Within a period, sample j of source k is due at

    t_kj = (j + 1/2) / c_k,      j = 0 .. c_k - 1

and the pattern is all P samples in the order of their due times, so every stretch of a blend is close to the weights
and every period has exactly c_k samples of source k. A seed turns the pattern by a random offset o:

    source(i) = pattern[(i + o) mod P],      place(i) = samples of that source among the i before it

Nothing is stored and nothing is counted up from zero: a resumed run, any rank and any worker agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

LONGEST_PERIOD = 1 << 20
Sample = tuple[np.ndarray, ...]


class Source(Protocol):
    """What a blend is made of: endless samples by number."""

    per_epoch: int

    def sample(self, index: int) -> Sample:
        """Tokens and labels, and a loss mask where not every label counts; `int64`, `int64`, `float32` `[s]`."""


def shares(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in the ratio of `weights` as they are written (0.7 : 0.3 is 7 : 3), `[K]`.

    Weights with so many digits that the period would pass `LONGEST_PERIOD` are rounded to that many parts.

    Raises:
        ValueError: a weight that is not above zero.
    """
    if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"weights {list(weights)} must be above 0")
    exact = [Fraction(str(w)) for w in weights]
    whole = [int(f * math.lcm(*(g.denominator for g in exact))) for f in exact]
    found = [n // math.gcd(*whole) for n in whole]
    if sum(found) <= LONGEST_PERIOD:
        return np.array(found, dtype=np.int64)
    scaled = np.array([float(f / sum(exact)) for f in exact])
    return np.maximum(1, np.rint(scaled * LONGEST_PERIOD)).astype(np.int64)


def pattern(counts: np.ndarray) -> np.ndarray:
    """Source numbers of one period, `[P]`: due times in order, ties to the first source."""
    owner = np.repeat(np.arange(len(counts)), counts)
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
    return owner[np.argsort(due, kind="stable")]


class Blend:
    """Samples of several sources by weight.

    Args:
        sources: what is blended; each counts its own samples from 0.
        weights: expected share of each, in any unit.
        seed: turns the pattern; None leaves it at its beginning.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], *, seed: int | None = None) -> None:
        self.sources, self.counts = tuple(sources), shares(weights)
        self.pattern = pattern(self.counts)
        self.period = len(self.pattern)
        rank = np.zeros(self.period, dtype=np.int64)
        for k, count in enumerate(self.counts):
            rank[self.pattern == k] = np.arange(count)
        self._rank = rank  # samples of the same source before each place of the pattern
        self.offset = 0 if seed is None else int(np.random.Generator(np.random.PCG64([seed])).integers(self.period))
        self._before = np.bincount(self.pattern[: self.offset], minlength=len(self.counts))

    @property
    def per_epoch(self) -> int:
        """Samples after which every source has been read at least once."""
        return max(-(-s.per_epoch * self.period // int(c)) for s, c in zip(self.sources, self.counts, strict=True))

    def place(self, index: int) -> tuple[int, int]:
        """(source, number of the sample within it) of sample `index`."""
        periods, within = divmod(int(index) + self.offset, self.period)
        k = int(self.pattern[within])
        return k, int(periods * self.counts[k] + self._rank[within] - self._before[k])

    def sample(self, index: int) -> Sample:
        """Sample `index` of the blend."""
        k, place = self.place(index)
        return self.sources[k].sample(place)


def spread(source: Source, count: int, *, between: bool = False) -> list[Sample]:
    """At most `count` samples, evenly over an epoch; of a blend, evenly over each source, in its weights.

    Args:
        between: those half-way between what is found without it. The two have no sample in common: where an epoch has
            fewer than `2 * count`, each has half of them (of a single sample, both have that).
    """
    return [sample for _, sample in spread_by_source(source, count, between=between)]


def spread_by_source(source: Source, count: int, *, between: bool = False) -> list[tuple[int, Sample]]:
    """The samples of `spread`, each with the number of its source in the blend (0 without one)."""
    if not isinstance(source, Blend):
        count = min(count, max(1, source.per_epoch // 2))
        return [(0, source.sample((2 * i + between) * source.per_epoch // (2 * count))) for i in range(count)]
    places = [source.place(i)[0] for i in range(count)]
    drawn = {k: iter(spread(s, places.count(k), between=between)) for k, s in enumerate(source.sources) if k in places}
    found = ((k, next(drawn[k], None)) for k in places)
    return [(k, sample) for k, sample in found if sample is not None]
