"""Subnets for a budget from cost alone: the uniform shrink, and random draws, as baselines and for the warm-up.

`propose_uniform` shrinks every dim by about the same ratio; it is deterministic, never exceeds the target by more
than `tolerance`, and comes as close to it as the choices allow. No torch here: `plan` uses it.
"""

import random
from collections.abc import Iterator
from itertools import product
from math import prod

from ..cost.budget import BudgetCost
from ..problems import Problem, ProblemsError
from ..space.choices import Selection, choice_shapes, full_selection, smallest_selection, subnet_of
from ..space.subnet import Subnet

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
    if cost.budget.is_full or not shapes:
        return full_selection(cost.space)
    names = tuple(shapes)
    price = cost.tables.uniform_cost(names)
    ratios = [[size / cost.space.dims[n].full for size in cost.space.dims[n].choices] for n in names]
    best: tuple[tuple[float, float], tuple[int, ...]] | None = None
    for picked in _uniform_candidates(cost, names, ratios):
        error = cost.error(price(picked))
        excess = max(0.0, -error - tolerance)
        if error > tolerance or (best is not None and excess > best[0][0]):
            continue
        key = (excess + SPREAD_WEIGHT * _spread([row[i] for row, i in zip(ratios, picked, strict=True)]), abs(error))
        if best is None or key < best[0]:
            best = key, picked
    assert best is not None, "the smallest selection is a candidate and fits"
    return {name: (i,) * shapes[name][0] for name, i in zip(names, best[1], strict=True)}


def _spread(ratios: list[float]) -> float:
    mean = sum(ratios) / len(ratios)
    return (sum((r - mean) ** 2 for r in ratios) / len(ratios)) ** 0.5


def _uniform_candidates(
    cost: BudgetCost, names: tuple[str, ...], ratios: list[list[float]]
) -> Iterator[tuple[int, ...]]:
    """All uniform selections of a small space; of a large one, those around the even-ratio ray."""
    if prod(map(len, ratios)) <= EXHAUSTIVE_LIMIT:
        yield from product(*(range(len(row)) for row in ratios))
        return
    yield tuple(len(row) - 1 for row in ratios)
    width = max(1, int((EXHAUSTIVE_LIMIT / 24) ** (1 / len(names))) // 2)
    price = cost.tables.uniform_cost(names)

    def near(ratio: float) -> tuple[int, ...]:
        return tuple(min(range(len(row)), key=lambda i: abs(row[i] - ratio)) for row in ratios)

    rays = sorted({r for row in ratios for r in row}, reverse=True)
    first = next((i for i, r in enumerate(rays) if cost.error(price(near(r))) <= 0), len(rays) - 1)
    seen = set()
    for ratio in rays[max(0, first - 2) : first + 2]:
        windows = [
            range(max(0, i - width), min(len(row), i + width + 1)) for i, row in zip(near(ratio), ratios, strict=True)
        ]
        for picked in product(*windows):
            if picked not in seen:
                seen.add(picked)
                yield picked


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
    message = (
        f"{cost.budget.value:g} cannot be reached: the smallest subnet of elastic.dims needs {cost.words(smallest)}; "
        "raise the budget or add smaller choices to elastic.dims"
    )
    raise ProblemsError([Problem(f"elastic.budgets.{cost.budget.name}", message)])
