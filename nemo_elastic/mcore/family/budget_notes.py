"""What a user should be told of budgets that a run does not meet: said once, when nothing can change any more."""

from __future__ import annotations

from collections.abc import Mapping

from ...cost.budget import BudgetCost
from ...plan.of_run import misses
from ...space.subnet import Subnet
from .planner import Planner, StepState


def notes_at(planner: Planner, state: StepState, first: bool) -> list[str]:
    """Sentences to log at a step.

    Args:
        first: the first step of this process: budgets with a given subnet are looked at then, learned ones at the step
            that freezes them.
    """
    found = given_notes(planner) if first else []
    if state.phase == "frozen":
        pinned = {
            name: chosen
            for name, chosen in state.chosen.items()
            if planner.subnet_of_choice(name, chosen) == planner.state.frozen[name]
        }
        notes = {name: chosen.note(planner.config.tolerance) for name, chosen in pinned.items()}
        found += [f"{name}: {note}" for name, note in notes.items() if note]
        fallen = {name: planner.state.frozen[name] for name in state.chosen if name not in pinned}
        found += _missed(planner, fallen, "search")
    if state.step == planner.timeline.frozen:
        found += _missed(planner, {name: planner.state.frozen[name] for name in planner.family.raced}, "raced")
    return found


def given_notes(planner: Planner) -> list[str]:
    """Forced subnets that are further from their budget than `router.tolerance`, and settings that nothing reads."""
    return [*_missed(planner, planner.family.forced, "forced"), *planner.family.unread]


def _missed(planner: Planner, subnets: Mapping[str, Subnet], origin: str) -> list[str]:
    family, rows = planner.family, []
    for name, subnet in subnets.items():
        cost = BudgetCost(family.space, family.layout, family.budget(name), **planner.conditions)
        rows.append({"name": name, "origin": origin, "error": cost.error(cost.of(subnet))})
    return misses(rows, planner.config.tolerance)
