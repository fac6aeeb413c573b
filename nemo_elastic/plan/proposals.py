"""`plan --search`: subnets for a budget from costs and importance scores alone, the baseline a router is judged by.

    uniform    every dim shrunk by about the same ratio                                  (no scores needed)
    random:N   N random subnets that meet the budget
    greedy     from the parent, again and again the one smaller choice that loses least damage per cost saved
    beam       all shapes near the budget whose estimated damage is close to the least: what races for it
    measured   the same, by held-out loss, cut from the sorted parent

No torch here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..config.sections import AUTO, RunConfig
from ..cost.budget import BudgetCost
from ..cost.conditions import serving_of
from ..family import Family, family_of
from ..problems import Problem, ProblemsError
from ..shapes.candidates import Candidate, candidates
from ..shapes.damage import Damage, read_scores
from ..shapes.greedy import greedy_selection
from ..shapes.search import propose_random, propose_uniform
from ..shapes.shadow_price import shadow_price
from ..space.choices import selection_of, subnet_of
from ..space.subnet import Subnet
from .of_run import budget_cost, budget_row, described_plan, misses

KEY = "--search"
BY_SCORES = ("greedy", "beam", "measured")  # need a ranking


@dataclass(frozen=True)
class Method:
    """A parsed `--search`."""

    name: str
    count: int = 1


def parse_method(text: str) -> Method:
    """`uniform`, `random:N`, `greedy`, `beam` or `measured`.

    Raises:
        ProblemsError: anything else.
    """
    name, colon, count = text.partition(":")
    if text in ("uniform", *BY_SCORES):
        return Method(text)
    if name == "random" and colon and count.isdigit() and int(count) > 0:
        return Method(name, int(count))
    *others, last = BY_SCORES
    words = f"{text!r} must be uniform, random:N (N from 1), {', '.join(others)} or {last}"
    raise ProblemsError([Problem(KEY, words)])


def search(run: RunConfig, method: Method, ranking: str | None = None) -> dict[str, Any]:
    """A plan whose budgets are proposals (one or several per budget), each with its exact `error` and, where
    there are scores, its estimated `damage`. Budgets that are full or forced are left out.

    Raises:
        ProblemsError: greedy without scores, an impossible budget, bad scores.
    """
    family, scores = family_of(replace(run, router=replace(run.router, frozen=False, shapes=AUTO))), None
    if ranking is not None:
        scores = read_scores(ranking, family.architecture)
        family = replace(family, space=replace(family.space, depth_ranking=scores.depth_ranking))
    elif method.name in BY_SCORES:
        raise ProblemsError(
            [Problem(KEY, f"{method.name} needs scores; give --ranking RUN (a folder that `rank` wrote)")]
        )
    damage = Damage(family.space, scores) if scores else None
    serving = serving_of(run.report, family.architecture)
    rows: list[dict[str, Any]] = []
    for budget in family.budgets:
        if budget.is_full or budget.name in family.forced:
            continue
        cost = budget_cost(family, serving, budget)
        found = _proposals(cost, method, damage, run)
        for number, subnet in enumerate(found):
            label = f"{method.name} {number}" if len(found) > 1 else method.name
            row = budget_row(family, serving, budget, subnet, label)
            if damage is not None:
                row["damage"] = damage.of(selection_of(family.space, subnet))
            rows.append(row)
    notes = [*family.notes, *misses(rows, run.router.tolerance)]
    if family.space.depth_is_assumed:
        notes.append("no --ranking: dropped layers are assumed evenly spread")
    return described_plan(run.name, family, serving, rows, notes)


def with_searched_shapes(run: RunConfig, ranking: str) -> RunConfig:
    """The configuration with `elastic.subnets` from greedy search for every budget that needs one.

    What `router.shapes: search` (the least damage) and `greedy` mean once there are scores. Deterministic: every
    process finds the same.

    Raises:
        ProblemsError: as `search`, in the words of a run.
    """
    method = Method("greedy" if run.router.method == "greedy" else "beam")
    found: dict[str, Any] = {}
    with _words_of_a_run(ranking):
        for row in search(run, method, ranking)["budgets"]:
            found.setdefault(row["name"], row["subnet"])
    return replace(run, elastic=replace(run.elastic, subnets={**run.elastic.subnets, **found}))


def racing(run: RunConfig, family: Family, ranking: str) -> dict[str, list[Candidate]]:
    """Who races for each budget that a race decides, the least damage first. Deterministic: every process the same.

    Raises:
        ProblemsError: no scores, or of another parent.
    """
    if not family.raced:
        return {}
    with _words_of_a_run(ranking):
        damage, serving = (
            Damage(family.space, read_scores(ranking, family.architecture)),
            serving_of(run.report, family.architecture),
        )
        costs = {name: budget_cost(family, serving, family.budget(name)) for name in family.raced}
        return {name: _candidates(cost, damage, run) for name, cost in costs.items()}


@dataclass(frozen=True)
class Start:
    """What scores tell a learned budget before the first step: the shape that a search pins, and what cost is worth."""

    shape: Subnet
    price: float


def starts(run: RunConfig, family: Family, ranking: str) -> dict[str, Start]:
    """Per learned budget; empty without scores, and with the paper's recipe, which knows neither. Deterministic: every
    process the same.
    """
    if not family.learned or run.router.recipe == "paper":
        return {}
    try:
        damage = Damage(family.space, read_scores(ranking, family.architecture))
    except ProblemsError:
        return {}
    serving, found = serving_of(run.report, family.architecture), {}
    for name in family.learned:
        cost = budget_cost(family, serving, family.budget(name))
        found[name] = Start(_candidates(cost, damage, run)[0].subnet, shadow_price(cost, damage))
    return found


def _candidates(cost: BudgetCost, damage: Damage, run: RunConfig) -> list[Candidate]:
    router = run.router
    return candidates(cost, damage, count=router.candidates, spread=router.candidate_spread, tolerance=router.tolerance)


@contextmanager
def _words_of_a_run(ranking: str) -> Iterator[None]:
    keys = {"--search": "router.shapes", "--ranking": ranking}
    try:
        yield
    except ProblemsError as error:
        raise ProblemsError([replace(p, key=keys.get(p.key, p.key)) for p in error.problems]) from error


def with_subnets_of(run: RunConfig, family: Family, subnets: Mapping[str, Any]) -> RunConfig:
    """The configuration with the shapes that a run has searched, for those that its file does not give."""
    searched = {b.name: subnets[b.name] for b in family.budgets if not b.is_full}
    return replace(run, elastic=replace(run.elastic, subnets={**searched, **run.elastic.subnets}))


def _proposals(cost: BudgetCost, method: Method, damage: Damage | None, run: RunConfig) -> list[Subnet]:
    tolerance = run.router.tolerance
    if method.name == "uniform":
        return [propose_uniform(cost, tolerance=tolerance)]
    if method.name == "greedy":
        return [subnet_of(cost.space, greedy_selection(cost, damage, tolerance=tolerance))]
    if method.name in BY_SCORES:
        return [c.subnet for c in _candidates(cost, damage, run)]
    found = propose_random(cost, method.count, seed=run.train.seed, tolerance=tolerance)
    if not found:
        words = f"no random subnet within {tolerance:g} of the budget was found; raise router.tolerance"
        raise ProblemsError([Problem(f"elastic.budgets.{cost.budget.name}", words)])
    return found


def best_of_each(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with the first proposal of every budget alone."""
    first: dict[str, Any] = {}
    for row in plan["budgets"]:
        first.setdefault(row["name"], row)
    return plan | {"budgets": list(first.values())}


def measured_order(plan: dict[str, Any]) -> None:
    """Rows of a plan by their budget's held-out loss, the best first."""
    names = list(dict.fromkeys(b["name"] for b in plan["budgets"]))
    plan["budgets"].sort(key=lambda b: (names.index(b["name"]), b["heldout_loss"]))
