"""Phase, temperature and logit scale of the router as pure functions of the step, so that a resume needs no state.

A run is `warmup` (every budget on its fixed uniform subnet, so that the weights adapt before the router moves), then
`soft` (all choices mixed by their probabilities: exploration), then `hard` (the chosen subnet alone, with
straight-through gates: what the children will be, and sliced). Over the soft phase tau falls geometrically and scale
rises linearly, so that the mixture has become a choice when the hard phase begins; they stay at their ends then.
"""

from dataclasses import dataclass, replace
from typing import Literal

from ..config.sections import RouterConfig

Phase = Literal["warmup", "soft", "hard"]


@dataclass(frozen=True)
class RouterPoint:
    """Where the router's schedule stands at one step."""

    phase: Phase
    tau: float
    scale: float


def resolve_recipe(config: RouterConfig) -> RouterConfig:
    """`recipe: paper` as values: lambda 1 and fixed, soft masks and a moving router all along, linear schedules."""
    if config.recipe != "paper":
        return config
    return replace(
        config,
        budget_lambda=1.0,
        dual_ascent_rate=0.0,
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


def phase_ends(total_steps: int, config: RouterConfig) -> tuple[int, int]:
    """First step of `soft` and first step of `hard`, both rounded once from their fractions of the run."""
    warm = round(config.warmup_fraction * total_steps)
    return warm, min(total_steps, warm + round(config.soft_fraction * total_steps))


def router_point(step: int, total_steps: int, config: RouterConfig) -> RouterPoint:
    """Phase, tau and scale at `step` (0-based) of `total_steps`."""
    soft, hard = phase_ends(total_steps, config)
    phase: Phase = "warmup" if step < soft else "soft" if step < hard else "hard"
    done = min(1.0, max(0.0, (step - soft) / max(1, hard - 1 - soft)))
    if config.recipe == "paper":
        tau = config.tau_start + (config.tau_end - config.tau_start) * done
    else:
        tau = config.tau_start * (config.tau_end / config.tau_start) ** done
    return RouterPoint(phase, tau, config.scale_start + (config.scale_end - config.scale_start) * done)


def soft_steps(total_steps: int, config: RouterConfig) -> int:
    """Length of the soft phase in steps."""
    soft, hard = phase_ends(total_steps, config)
    return hard - soft
