"""What families with Mamba layers share: one epsilon, and a step of the scan that nothing clamps, as in Megatron."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..problems import Problem
from .adapter import Model, Only
from .said import Said

# Fixed in the norm of Megatron's mixer; where a family has one epsilon for all norms, only this one means the same.
EPSILON = 1e-5
NO_STEP_BELOW, NO_STEP_ABOVE = 1e-30, 1e30  # a clamp to these is none: no step of the scan gets there


def one_epsilon(keys: tuple[str, ...], why: str, default: float | None = None) -> Only:
    """The keys of a family's one epsilon; `default`: of its class, if it is another."""
    words = f"{why}, Megatron's Mamba mixer always has {EPSILON}"
    return Only(keys=keys, allowed=(EPSILON,), why=words, default=default)


def epsilon_problems(why: str) -> Callable[[Model], list[Problem]]:
    """The same of a model section that is to be written."""

    def problems(model: Model) -> list[Problem]:
        value = model["layernorm_epsilon"]
        words = f"{value} must be {EPSILON}: {why}, Megatron's Mamba mixer always has {EPSILON}"
        return [] if value == EPSILON else [Problem("model.layernorm_epsilon", words)]

    return problems


def read_step_limit(said: Said) -> None:
    """Note a limit of the scan's step that is one."""
    for name in ("time_step_limit", "mamba_dt_limit"):
        if said.config.get(name) is not None and not _is_no_limit(said.config[name]):
            words = f"{said.config[name]!r} must be (0, inf): Megatron's kernels do not clamp the step"
            said.wrong(name, words)


def _is_no_limit(limit: Any) -> bool:
    """Infinity is no JSON: it is met as a word, and as transformers' `{"__float__": "Infinity"}`."""
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        return False
    try:
        low, high = (float(v["__float__"] if isinstance(v, Mapping) else v) for v in limit)
    except (KeyError, OverflowError, TypeError, ValueError):
        return False
    return 0 <= low <= NO_STEP_BELOW and high >= NO_STEP_ABOVE
