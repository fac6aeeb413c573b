"""What a user should be told of budgets that a run does not meet: said once, when nothing can change any more."""

from __future__ import annotations

from ...cost.budget import BudgetCost
from ...plan.of_run import misses
from .planner import Planner, StepState


def notes_at(planner: Planner, state: StepState, first: bool) -> list[str]:
    """Sentences to log at a step.

    Args:
        first: the first step of this process: budgets with a given subnet are looked at then, learned ones at the step
            that freezes them.
    """
    found = given_notes(planner) if first else []
    if state.phase == "frozen":
        notes = {name: chosen.note(planner.config.tolerance) for name, chosen in state.chosen.items()}
        found += [f"{name}: {note}" for name, note in notes.items() if note]
    return found


def given_notes(planner: Planner) -> list[str]:
    """Forced subnets that are further from their budget than `router.tolerance`."""
    family, rows = planner.family, []
    for name, subnet in family.forced.items():
        cost = BudgetCost(family.space, family.layout, family.budget(name), **planner.conditions)
        rows.append({"name": name, "origin": "forced", "error": cost.error(cost.of(subnet))})
    return misses(rows, planner.config.tolerance)
