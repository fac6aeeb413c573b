"""`train.recipe`: a way of training under one name, written out as the keys that it sets when a file is read.

    last_percent    a micro-batch may teach all budgets, the full member is in each, rates are RATE of the file's

What it was measured to do, and what a step then costs: docs/training.md, *The last percent*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .sections import OptimizerSettings, RunConfig, StageConfig

RECIPES = ("default", "last_percent", "written_out")  # the last: what a recipe has set; not to be set again
RATE = 0.3  # of the learning rates that the configuration names
FULL = 0.55  # how often the full member is drawn; of the rest the next has one part, the one below it two, ...
WHOLE = ("fraction", 1.0)  # the full member


def with_recipe(config: RunConfig, given: Mapping[str, Any], origins: dict[str, str]) -> RunConfig:
    """The configuration that `train.recipe` means.

    Args:
        given: plain values as they were read, without defaults: what they name besides rates stays.
        origins: of values; what is set here is added.
    """
    if config.train.recipe != "last_percent":
        return config
    budgets, train, name = config.elastic.budgets, config.train, f"train.recipe={config.train.recipe}"
    distill = config.distill
    if budgets and (given.get("distill") or {}).get("budgets_per_batch") is None:
        distill = replace(distill, budgets_per_batch=len(budgets))
        origins["distill.budgets_per_batch"] = name
    shares, stages = probabilities(budgets), []
    for number, stage in enumerate(train.stages):
        stages.append(_slowed(stage, shares))
        if stage.budget_probabilities is None and shares:
            origins |= {f"train.stages.{number}.budget_probabilities.{budget}": name for budget in shares}
        if stage.lr is not None:
            origins[f"train.stages.{number}.lr"] = f"{name}: {RATE:g} x {stage.lr:g}"
    optimizer = _rates(train.optimizer, [stage.lr for stage in stages if stage.lr is not None])
    origins |= {"train.optimizer.lr": f"{name}: {RATE:g} x {train.optimizer.lr:g}", "train.recipe": name}
    changed = {"stages": tuple(stages), "optimizer": optimizer, "recipe": "written_out"}
    return replace(config, distill=distill, train=replace(train, **changed))


def recipe_notes(config: RunConfig) -> list[str]:
    """What the recipe has made of this configuration, for whoever plans it."""
    if config.train.recipe == "default":
        return []
    train, drawn = config.train, probabilities(config.elastic.budgets)
    taken = [stage.budget_probabilities == drawn for stage in train.stages] if drawn else []
    shares = ", ".join(f"{name} {share:g}" for name, share in drawn.items())
    how = f"budgets drawn {shares}" if taken and all(taken) else "budgets drawn as stages say, or alike"
    rate = f"learning rate {train.optimizer.lr:g}, {RATE:g} of the one given"
    words = f"{rate}; distill.budgets_per_batch {config.distill.budgets_per_batch}; {how}"
    return [f"train.recipe=last_percent is written out: {words}"]


def _slowed(stage: StageConfig, shares: Mapping[str, float]) -> StageConfig:
    lr = None if stage.lr is None else RATE * stage.lr
    given = stage.budget_probabilities
    return replace(stage, lr=lr, budget_probabilities=given if given is not None or not shares else dict(shares))


def _rates(settings: OptimizerSettings, of_stages: Sequence[float]) -> OptimizerSettings:
    lr = RATE * settings.lr
    return replace(settings, lr=lr, min_lr=min(settings.min_lr, lr, *of_stages))


def probabilities(budgets: Mapping[str, Any]) -> dict[str, float]:
    """How often each budget is drawn. Their order is by size where their values compare, else as it is written."""
    sizes = {name: _size(value) for name, value in budgets.items()}
    full = [name for name, size in sizes.items() if size == WHOLE]
    others = [name for name in budgets if name not in full]
    if len({sizes[name][0] for name in others}) == 1:
        others.sort(key=lambda name: -sizes[name][1])
    if not full or not others:
        return {}
    parts = {name: number for number, name in enumerate(others, 1)}
    rest = (1 - FULL) / sum(parts.values())
    shares = dict.fromkeys(full, FULL / len(full)) | {name: round(rest * part, 6) for name, part in parts.items()}
    return {name: shares[name] for name in budgets}


def _size(value: Any) -> tuple[str, float]:
    kind, number = (value.get("kind"), value.get("value")) if isinstance(value, Mapping) else (None, value)
    try:
        number = float(number)
    except (TypeError, ValueError):
        return str(value), 0.0  # no budget; who reads it next says so
    return kind or ("fraction" if number <= 1 else "parameters"), number
