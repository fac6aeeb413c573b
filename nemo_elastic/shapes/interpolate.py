"""A subnet for a budget between two trained ones: every size lies between those of its neighbours, on a line if it can.

    size_r(t) = smaller_r + t (larger_r - smaller_r),      layers: the smaller one's and the first of those between

Both neighbours were trained and share their prefixes, so what lies between them is made of trained units only. t is
found by the exact cost; single sizes then move until the budget is met within the tolerance, as little off the line as
possible. Sizes are those of the neighbours or multiples: of the largest step that all choices of their dim share, if
kernels like it, else of what ratios round to, then of 16, of 8, and only where none of these meets the budget of the
groups alone. Outside the trained range nothing is known and nothing is proposed. No torch here.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import gcd, lcm

from ..cost.budget import BudgetCost
from ..problems import Problem, ProblemsError
from ..space.alignment import BF16_MULTIPLE, FP8_MULTIPLE, default_multiples
from ..space.dims import WIDTH_DIMS
from ..space.elastic_space import ElasticSpace, even_thinning
from ..space.subnet import Subnet

STEPS = 200  # points tried on the line


@dataclass(frozen=True)
class Between:
    """The answer for a budget: `smaller` and `larger` are the neighbours' names (equal at a trained budget)."""

    subnet: Subnet
    smaller: str
    larger: str
    error: float
    nested: bool

    def notes(self, tolerance: float) -> list[str]:
        """What a user should know about it."""
        found = []
        if not self.nested:
            found.append(f"{self.smaller} is not nested in {self.larger}: some sizes between them fall as others rise")
        if abs(self.error) > tolerance:
            side = "below" if self.error < 0 else "ABOVE"
            found.append(f"the nearest subnet between them is {abs(self.error):.1%} {side} the budget")
        return found


def between(cost: BudgetCost, trained: Mapping[str, Subnet], *, tolerance: float = 0.01) -> Between:
    """The subnet that meets `cost.budget`, from the trained subnets of a family; a trained one where that meets it.

    Raises:
        ProblemsError: the budget is outside the trained range; the message says the range in the budget's unit.
    """
    costs = {name: cost.of(subnet) for name, subnet in trained.items()}
    order = sorted(trained, key=costs.__getitem__)
    low, high = costs[order[0]], costs[order[-1]]
    near = min(order, key=lambda name: abs(cost.error(costs[name])))
    if abs(cost.error(costs[near])) <= tolerance:
        return Between(trained[near], near, near, cost.error(costs[near]), True)
    if not low <= cost.target <= high:
        words = (
            f"{cost.in_user_units(cost.target):g} is outside the trained range: {cost.words(low)} ({order[0]}) to "
            f"{cost.words(high)} ({order[-1]}); train that budget too"
        )
        raise ProblemsError([Problem("--budget", words)])
    smaller, larger = next((a, b) for a, b in pairwise(order) if costs[a] <= cost.target <= costs[b])
    found = None
    for steps in step_sizes(cost.space):
        subnet = _Line(cost, trained[smaller], trained[larger], steps).best(tolerance)
        excess = _excess(cost.error(cost.of(subnet)), tolerance)
        if found is None or excess < found[0]:
            found = excess, subnet
        if not excess:
            break
    subnet = found[1]
    nested = trained[smaller].is_nested_in(trained[larger])
    assert not nested or (trained[smaller].is_nested_in(subnet) and subnet.is_nested_in(trained[larger]))
    return Between(subnet, smaller, larger, cost.error(cost.of(subnet)), nested)


def _excess(error: float, tolerance: float) -> float:
    """By how much a budget is missed. Too large is worse than too small: a budget is a limit."""
    return max(0.0, abs(error) - tolerance) * (10 if error > tolerance else 1)


@dataclass(frozen=True)
class _Row:
    """One size that lies between: what it sets (`layer_row` None: all layers alike), its two ends and its step."""

    dim: str
    layer_row: int | None
    ends: tuple[int, int]
    step: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """What it may be, ascending: the ends, and the multiples of the step between them."""
        return _multiples(min(self.ends), max(self.ends), self.step)

    def at(self, t: float) -> int:
        a, b = self.ends
        sizes, wanted = self.sizes, a + t * (b - a)
        place = bisect_left(sizes, wanted)
        return min(sizes[max(0, place - 1) : place + 1], key=lambda size: abs(size - wanted))

    def near(self, size: int) -> Iterator[int]:
        """The next ones on both sides, and the ends."""
        place = self.sizes.index(size)
        yield from (self.sizes[p] for p in (place - 1, place + 1) if 0 <= p < len(self.sizes))
        yield from (end for end in self.ends if end != size)

    def place(self, size: int) -> float:
        a, b = self.ends
        return (size - a) / (b - a)


@cache
def _multiples(low: int, high: int, step: int) -> tuple[int, ...]:
    return tuple(sorted({low, high, *range(-(-low // step) * step, high, step)}))


class _Line:
    def __init__(self, cost: BudgetCost, smaller: Subnet, larger: Subnet, steps: Mapping[str, int]) -> None:
        self.cost, self.space, self.smaller, self.larger = cost, cost.space, smaller, larger
        self.rows = list(_rows(steps, smaller, larger))
        base = set(smaller.layers) & set(larger.layers)
        ranking = cost.space.depth_ranking or even_thinning(cost.space.architecture, cost.space.depth_unit)
        self.always = base
        self.extra = [i for i in ranking if i in (set(smaller.layers) | set(larger.layers)) - base]
        self.depths = (len(smaller.layers) - len(base), len(larger.layers) - len(base))

    def best(self, tolerance: float) -> Subnet:
        """Per depth the nearest point of the line, improved by single steps; of all depths the best."""
        depths = range(min(self.depths), max(self.depths) + 1, self.space.depth_unit)
        found = [self._at_depth(extra, tolerance) for extra in depths]
        _, point, extra = min(found, key=lambda f: f[0])
        return self._subnet(point, extra)

    def _at_depth(self, extra: int, tolerance: float) -> tuple:
        found = None
        for i in range(STEPS + 1 if self.rows else 1):
            found = self._better(found, [row.at(i / STEPS) for row in self.rows], extra, tolerance)
        before = None
        while found is not before:
            before = found
            for moved in self._neighbours(before[1]):
                found = self._better(found, moved, extra, tolerance)
        return found

    def _better(self, best: tuple | None, point: list[int], extra: int, tolerance: float) -> tuple:
        error = self.cost.error(self.cost.of(self._subnet(point, extra)))
        key = (_excess(error, tolerance), self._off_line(point, extra), abs(error))
        return (key, point, extra) if best is None or key < best[0] else best

    def _off_line(self, point: list[int], extra: int) -> float:
        places = [row.place(size) for row, size in zip(self.rows, point, strict=True)]
        if self.depths[0] != self.depths[1]:
            places.append((extra - self.depths[0]) / (self.depths[1] - self.depths[0]))
        mean = sum(places) / max(1, len(places))
        return (sum((p - mean) ** 2 for p in places) / max(1, len(places))) ** 0.5

    def _neighbours(self, point: list[int]) -> Iterator[list[int]]:
        for r, row in enumerate(self.rows):
            for size in row.near(point[r]):
                yield [*point[:r], size, *point[r + 1 :]]

    def _subnet(self, point: list[int], extra: int) -> Subnet:
        values: dict[str, int | list[int]] = {}
        for row, size in zip(self.rows, point, strict=True):
            old = getattr(self.smaller, row.dim)
            if not isinstance(old, tuple):
                values[row.dim] = size
            elif row.layer_row is None:
                values[row.dim] = [size] * len(old)
            else:
                values.setdefault(row.dim, list(old))[row.layer_row] = size
        exact = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        layers = tuple(sorted(self.always | set(self.extra[:extra])))
        return replace(self.smaller, **exact, layers=layers)


def _rows(steps: Mapping[str, int], smaller: Subnet, larger: Subnet) -> Iterator[_Row]:
    for name in WIDTH_DIMS:
        a, b = getattr(smaller, name), getattr(larger, name)
        step = steps[name]
        if not isinstance(a, tuple):
            if a != b:
                yield _Row(name, None, (a, b), step)
            continue
        if len(set(a)) <= 1 and len(set(b)) <= 1:
            if a != b:
                yield _Row(name, None, (a[0], b[0]), step)
            continue
        for r, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                yield _Row(name, r, (x, y), step)


def step_sizes(space: ElasticSpace) -> Iterator[dict[str, int]]:
    """Steps per dim, from what kernels like best to what they need not like; all are multiples of the dim's groups."""
    dims, liked = {name: space.dims[name] for name in WIDTH_DIMS}, default_multiples(space.architecture)
    whole = {n: gcd(*d.choices) if len(d.choices) > 1 else d.groups for n, d in dims.items()}

    def multiples(least: int, most: int) -> dict[str, int]:
        wanted = {n: liked.get(n, 1) for n in dims}
        return {n: lcm(d.groups, min(max(wanted[n], least), most) if wanted[n] > 1 else 1) for n, d in dims.items()}

    best = multiples(FP8_MULTIPLE, max(FP8_MULTIPLE, *liked.values()))
    of_choices = {n: step if step % best[n] == 0 else best[n] for n, step in whole.items()}
    groups = {n: d.groups for n, d in dims.items()}
    fewer = (multiples(n, n) for n in (FP8_MULTIPLE, BF16_MULTIPLE))
    rungs = (of_choices, best, *fewer, whole, groups)
    yield from (steps for i, steps in enumerate(rungs) if steps not in rungs[:i])
