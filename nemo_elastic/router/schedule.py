"""Phase, temperature and logit scale of the router as pure functions of the step, so that a resume needs no state.

A run is `warmup` (every budget on one fixed subnet, so that the weights adapt before the router moves), then
`soft` (all choices mixed by their probabilities: exploration), then `hard` (the chosen subnet alone, with
straight-through gates: what the children will be, and sliced). Over the soft phase tau falls geometrically and scale
rises linearly, so that the mixture has become a choice when the hard phase begins; they stay at their ends then.
Over the last `settle_fraction` of the soft phase the router is led to a choice that meets its budget (`settle`). In
the last phase, `frozen`, the choices are pinned. A race of candidates has one phase in front of that, `race`. The
phases are fractions of the run, or named stage by stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from ..config.sections import RouterConfig, StageConfig

Phase = Literal["warmup", "soft", "hard", "race", "frozen"]


@dataclass(frozen=True)
class RouterPoint:
    """Where the router's schedule stands. `settle`: weight of the pull to a choice that fits, in the soft phase."""

    phase: Phase
    tau: float
    scale: float
    settle: float = 0.0


def resolve_recipe(config: RouterConfig) -> RouterConfig:
    """`recipe: paper` as values: lambda 1 and fixed, soft masks and a moving router all along, linear schedules."""
    if config.recipe != "paper":
        return config
    return replace(
        config,
        budget_lambda=1.0,
        dual_ascent_rate=0.0,
        settle_weight=0.0,
        dead_zone=0.0,
        warmup_fraction=0.0,
        soft_fraction=1.0,
        freeze_fraction=0.0,
        tau_start=1.0,
        tau_end=0.05,
        scale_start=1.0,
        scale_end=10.0,
        lr=1e-2,
    )


@dataclass(frozen=True)
class Timeline:
    """First step of the `soft`, `hard` and `frozen` phases, and the length of the run.

    `races`: there is one phase in front of `frozen`, in which candidates race.
    """

    soft: int
    hard: int
    frozen: int
    total: int
    races: bool = False

    @classmethod
    def of(cls, config: RouterConfig, total_steps: int, stages: Sequence[StageConfig] = ()) -> "Timeline":
        """From the fractions of the run, or from the phases that its stages name.

        Raises:
            ValueError: some stages name a phase and others do not.
        """
        named = [stage.router for stage in stages]
        if not any(named) and config.races:
            frozen = round(config.race_fraction * total_steps)
            return cls(0, 0, frozen, total_steps, races=True)
        if not any(named):
            warm = round(config.warmup_fraction * total_steps)
            hard = min(total_steps, warm + round(config.soft_fraction * total_steps))
            frozen = total_steps - round(config.freeze_fraction * total_steps)
            return cls(min(warm, frozen), min(hard, frozen), frozen, total_steps)
        if not all(named):
            raise ValueError("train.stages: give `router` for every stage or for none")

        def first(*phases: Phase) -> int:
            return sum(stage.steps for stage in stages if stage.router not in phases)

        if config.races:
            return cls(0, 0, first("frozen"), total_steps, races=True)
        return cls(first("soft", "hard", "frozen"), first("hard", "frozen"), first("frozen"), total_steps)

    @property
    def soft_steps(self) -> int:
        """Length of the soft phase."""
        return self.hard - self.soft

    def phase(self, step: int) -> Phase:
        """The phase of `step` (0-based)."""
        if step >= self.frozen:
            return "frozen"
        if self.races:
            return "race"
        return "warmup" if step < self.soft else "soft" if step < self.hard else "hard"

    def spans(self, end: int | None = None) -> dict[Phase, tuple[int, int]]:
        """(first step, first step behind it) per phase; the last one ends at `end`, or with the run."""
        end = self.total if end is None else end
        if self.races:
            return {"race": (0, self.frozen), "frozen": (self.frozen, end)}
        edges = (0, self.soft, self.hard, self.frozen, end)
        return dict(zip(("warmup", "soft", "hard", "frozen"), pairwise(edges), strict=True))

    def rounds(self, count: int) -> tuple[int, ...]:
        """Steps behind which the rounds of a race end, ascending; at most `count`, the last with the race."""
        return tuple(sorted({self.frozen * (i + 1) // count for i in range(count)} - {0})) if self.races else ()

    def point(self, step: int, config: RouterConfig) -> RouterPoint:
        """Phase, tau and scale at `step`."""
        done = min(1.0, max(0.0, (step - self.soft) / max(1, self.hard - 1 - self.soft)))
        if config.recipe == "paper":
            tau = config.tau_start + (config.tau_end - config.tau_start) * done
        else:
            tau = config.tau_start * (config.tau_end / config.tau_start) ** done
        scale = config.scale_start + (config.scale_end - config.scale_start) * done
        gone = 1 - (1 - done) / config.settle_fraction if config.settle_fraction else float(done == 1)
        settle = config.settle_weight * max(0.0, gone)
        return RouterPoint(self.phase(step), tau, scale, settle)
