"""Subnets for a budget from cost alone: the uniform shrink, and random draws, as baselines and for the warm-up.

`propose_uniform` shrinks every dim by about the same ratio; it is deterministic, never exceeds the target by more
than `tolerance`, and comes as close to it as the choices allow. No torch here: `plan` uses it.
"""

import random
from collections.abc import Iterator
from itertools import product
from math import prod

from .budget_cost import BudgetCost
from .choices import Selection, choice_shapes, full_selection, smallest_selection, subnet_of
from .problems import Problem, ProblemsError
from .space import ElasticSpace, Subnet

EXHAUSTIVE_LIMIT = 40_000  # uniform selections that are simply all tried
SPREAD_WEIGHT = 0.1  # a standard deviation of 0.1 between the dims' ratios weighs like 1 % of the target


def propose_uniform(cost: BudgetCost, *, tolerance: float = 0.01) -> Subnet:
    """One size per dim, all shrunk alike.

    Raises:
        ProblemsError: no subnet of the space is small enough; the message names the smallest reachable cost.
    """
    return subnet_of(cost.space, uniform_selection(cost, tolerance=tolerance))


def uniform_selection(cost: BudgetCost, *, tolerance: float = 0.01) -> Selection:
    """`propose_uniform` as a selection."""
    raise_if_impossible(cost, tolerance)
    shapes = choice_shapes(cost.space)
    if cost.budget.is_full:
        return full_selection(cost.space)
    best: tuple[tuple[float, ...], Selection] | None = None
    for indices in _uniform_candidates(cost.space, cost):
        selection = {name: (i,) * shapes[name][0] for name, i in indices.items()}
        error = cost.error(cost.tables.cost(selection))
        if error > tolerance:
            continue
        ratios = [cost.space.dims[n].choices[i] / cost.space.dims[n].full for n, i in indices.items()]
        mean = sum(ratios) / max(1, len(ratios))
        spread = (sum((r - mean) ** 2 for r in ratios) / max(1, len(ratios))) ** 0.5
        key = (max(0.0, -error - tolerance) + SPREAD_WEIGHT * spread, abs(error))
        if best is None or key < best[0]:
            best = key, selection
    assert best is not None, "the smallest selection is a candidate and fits"
    return best[1]


def _uniform_candidates(space: ElasticSpace, cost: BudgetCost) -> Iterator[dict[str, int]]:
    """All uniform selections of a small space; of a large one, those around the even-ratio ray."""
    counts = {name: n for name, (_, n) in choice_shapes(space).items()}
    names = list(counts)
    if prod(counts.values()) <= EXHAUSTIVE_LIMIT:
        for indices in product(*(range(n) for n in counts.values())):
            yield dict(zip(names, indices, strict=True))
        return
    yield {n: counts[n] - 1 for n in names}
    width = max(1, int((EXHAUSTIVE_LIMIT / 24) ** (1 / len(names))) // 2)
    shapes = choice_shapes(space)
    ratios = sorted({c / space.dims[n].full for n in names for c in space.dims[n].choices}, reverse=True)

    def near(ratio: float, name: str) -> int:
        sizes = space.dims[name].choices
        return min(range(len(sizes)), key=lambda i: abs(sizes[i] / space.dims[name].full - ratio))

    def too_large(ratio: float) -> bool:
        at = {n: (near(ratio, n),) * shapes[n][0] for n in names}
        return cost.error(cost.tables.cost(at)) > 0

    first = next((i for i, r in enumerate(ratios) if not too_large(r)), len(ratios) - 1)
    seen = set()
    for ratio in ratios[max(0, first - 2) : first + 2]:
        windows = []
        for name in names:
            middle = near(ratio, name)
            windows.append(range(max(0, middle - width), min(counts[name], middle + width + 1)))
        for indices in product(*windows):
            if indices not in seen:
                seen.add(indices)
                yield dict(zip(names, indices, strict=True))


def propose_random(cost: BudgetCost, n: int, *, seed: int, tolerance: float = 0.01, tries: int = 200) -> list[Subnet]:
    """Up to `n` different random subnets within `tolerance` of the target (fewer when the choices allow no more).

    Each starts at random choices in every row and walks by random single moves towards the target.

    Raises:
        ProblemsError: as `propose_uniform`.
    """
    raise_if_impossible(cost, tolerance)
    draw, found = random.Random(seed), {}
    for _ in range(tries * n):
        if len(found) == n:
            break
        selection = _random_walk(cost, draw, tolerance)
        if selection is not None:
            found.setdefault(subnet_of(cost.space, selection), None)
    return list(found)


def _random_walk(cost: BudgetCost, draw: random.Random, tolerance: float, moves: int = 400) -> Selection | None:
    shapes = choice_shapes(cost.space)
    rows = {name: [draw.randrange(choices) for _ in range(count)] for name, (count, choices) in shapes.items()}
    for _ in range(moves):
        selection = {name: tuple(row) for name, row in rows.items()}
        error = cost.error(cost.tables.cost(selection))
        if abs(error) <= tolerance:
            return selection
        step = 1 if error > 0 else -1
        movable = [(n, r) for n, row in rows.items() for r, i in enumerate(row) if 0 <= i + step < shapes[n][1]]
        if not movable:
            return None
        name, row = draw.choice(movable)
        rows[name][row] += step
    return None


def raise_if_impossible(cost: BudgetCost, tolerance: float = 0.01) -> None:
    """Refuse a budget that the smallest subnet of the space exceeds.

    Raises:
        ProblemsError: names the smallest reachable cost, in the budget's own unit.
    """
    smallest = cost.tables.cost(smallest_selection(cost.space))
    if cost.error(smallest) <= tolerance:
        return
    unit = {"fraction": "of the parent's parameters", "parameters": "parameters", "memory_gb": "GB"}
    reach, kind = cost.in_user_units(smallest), cost.budget.kind
    words = f"{int(reach)}" if kind == "parameters" else f"{reach:.4g}"
    message = (
        f"{cost.budget.value:g} cannot be reached: the smallest subnet of elastic.dims needs {words} "
        f"{unit.get(kind, 'ms')}; raise the budget or add smaller choices to elastic.dims"
    )
    raise ProblemsError([Problem(f"elastic.budgets.{cost.budget.name}", message)])
