"""`plan NESTED`: the trained budgets of a nested checkpoint, or the subnet of any budget between them.

The manifest of a nested checkpoint says all that is needed: space, measured ranking, a trained subnet per budget, and
the configuration of the run for the serving conditions. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from ..config.load import load_config
from ..config.sections import RunConfig
from ..cost.conditions import serving_of
from ..family import Family, parse_budget
from ..files import read_yaml, write_text
from ..problems import Problem, ProblemsError, raise_if_any
from ..shapes.interpolate import between
from ..space.alignment import subnet_notes
from ..space.budget import Budget
from ..space.elastic_space import ElasticSpace
from ..space.subnet import Subnet
from .of_run import budget_cost, budget_row, described_plan, misses


class Trained(Protocol):
    """What this module needs of a manifest."""

    model: Mapping[str, Any]
    space: ElasticSpace
    budgets: Mapping[str, Budget]
    subnets: Mapping[str, Subnet]
    provenance: Mapping[str, Any]


def plan_nested(manifest: Trained, budget: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A plan with the trained budgets (`budget` None), or with one budget anywhere in the trained range.

    Args:
        budget: a trained budget's name, `0.6`, a number of parameters, or `KIND:VALUE`.
        overrides: of the run's configuration, for the `report` and `router.tolerance` keys.

    Raises:
        ProblemsError: not a budget, or one outside the trained range.
    """
    run = _configuration(manifest, overrides)
    family = Family(
        architecture=manifest.space.architecture,
        space=manifest.space,
        budgets=tuple(manifest.budgets.values()),
        forced=dict(manifest.subnets),
        model=manifest.model,
    )
    serving, tolerance = serving_of(run.report, family.architecture), run.router.tolerance
    if budget is None or budget in manifest.subnets:
        names = list(manifest.subnets) if budget is None else [budget]
        rows = [budget_row(family, serving, manifest.budgets[n], manifest.subnets[n], "trained") for n in names]
        return described_plan(run.name, family, serving, rows, misses(rows, tolerance))
    wanted = _wanted(budget, manifest.subnets)
    found = between(budget_cost(family, serving, wanted), manifest.subnets, tolerance=tolerance)
    trained = found.smaller == found.larger
    origin = f"trained as {found.smaller}" if trained else f"between {found.smaller} and {found.larger}"
    row = budget_row(family, serving, wanted, found.subnet, origin)
    neighbours = [manifest.subnets[name] for name in (found.smaller, found.larger)]
    notes = [*found.notes(tolerance), *subnet_notes(family.layout, found.subnet, neighbours)]
    return described_plan(run.name, family, serving, [row], notes)


def _configuration(manifest: Trained, overrides: Sequence[str]) -> RunConfig:
    """The run's serving conditions and tolerance, with overrides of these."""
    allowed = ("report.", "router.tolerance=")
    raise_if_any(
        Problem(word.split("=")[0], "cannot be set for a nested checkpoint; report.* and router.tolerance can")
        for word in overrides
        if not word.startswith(allowed)
    )
    made = manifest.provenance.get("config") or {}
    base = {name: made[name] for name in ("name", "report", "router") if name in made}
    return load_config(None, overrides, base=base | {"model": dict(manifest.model)}).config


def _wanted(text: str, known: Mapping[str, Subnet]) -> Budget:
    kind, colon, value = text.partition(":")
    target: Any = text
    if colon:
        try:
            target = {"kind": kind.strip(), "value": float(value)}
        except ValueError as error:
            raise ProblemsError([Problem("--budget", f"{text!r} must be KIND:VALUE, as in memory_gb:12")]) from error
    try:
        return parse_budget(text.replace(":", "_"), target)
    except ProblemsError as error:
        words = f"{text!r} is no budget: give a number, KIND:VALUE, or one of {', '.join(known)}"
        details = "" if isinstance(target, str) and not text[:1].isdigit() else f" ({error.problems[0].message})"
        raise ProblemsError([Problem("--budget", words + details)]) from error


def write_subnets(path: Path, plan: Mapping[str, Any]) -> Path:
    """The plan's budgets and subnets as a configuration: to build on (`base: [subnet.yaml]`), or for `extract`."""
    budgets = {b["name"]: dict(b["target"]) for b in plan["budgets"]}
    subnets = {b["name"]: b["subnet"] for b in plan["budgets"]}
    origins = ", ".join(f"{b['name']}: {b['origin']}, {b['parameters']:,} parameters" for b in plan["budgets"])
    content = yaml.safe_dump(
        {"elastic": {"budgets": budgets, "subnets": subnets}}, sort_keys=False, default_flow_style=None, width=118
    )
    return write_text(path, f"# {plan['name']}: {origins}\n{content}")


def with_subnets(manifest: Any, path: str | Path) -> Any:
    """A manifest whose children are those of a file that `write_subnets` wrote.

    Raises:
        ProblemsError: unreadable, without `elastic.subnets`, or sizes that the parent cannot have.
    """
    if not Path(path).is_file():
        words = f"no file {str(path)!r}; `plan NESTED --budget 0.6 --output YAML` writes one"
        raise ProblemsError([Problem("--subnet", words)])
    try:
        elastic = read_yaml(Path(path))["elastic"]
        subnets = {str(name): manifest.space.subnet_from_dict(sizes) for name, sizes in elastic["subnets"].items()}
        budgets = {name: parse_budget(name, elastic["budgets"][name]) for name in subnets}
    except ProblemsError as error:
        raise ProblemsError([Problem(f"--subnet {path}: {p.key}", p.message) for p in error.problems]) from error
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        words = f"{str(path)!r} has no elastic.budgets and elastic.subnets ({reason}); `plan NESTED --output` writes it"
        raise ProblemsError([Problem("--subnet", words)]) from error
    return replace(manifest, budgets=budgets, subnets=subnets)
