"""What a configured family will be, before a GPU-hour is spent: sizes, parameters, memory, FLOPs, legality.

Before `rank` and `train` have run, the sizes of a budget are a proposal (an even shrink that meets the target) and
the dropped layers are an assumption; both are marked as such. No torch here: this runs on a laptop in a second.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .budget_cost import BudgetCost
from .config.sections import RunConfig
from .cost import BYTE_PROFILES, flops, memory, parameters, parameters_by_kind
from .deployment import deployment, fp8_problems
from .family import Family, family_of, parallel_problems
from .problems import Problem, ProblemsError
from .search import propose_uniform
from .space import WIDTH_DIMS, Subnet


def plan(run: RunConfig, depth_ranking: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The plan as plain values (`plan --json` prints exactly this). Its `problems` are not raised.

    Raises:
        ProblemsError: when not even the parent can be described.
    """
    found: list[Problem] = []
    try:
        family = family_of(run, depth_ranking)
    except ProblemsError as error:
        found += error.problems
        family = family_of(replace(run, elastic=replace(run.elastic, dims={}, budgets={}, subnets={})))
    found += parallel_problems(family.architecture, run.train, family.space.ffn_groups)
    budgets = []
    for budget in family.budgets:
        try:
            budgets.append(_budget(run, family, budget.name))
            if run.model.get("fp8"):
                subnet = family.space.subnet_from_dict(budgets[-1]["subnet"])
                found += fp8_problems(family.layout, subnet, f"elastic.budgets.{budget.name}")
        except ProblemsError as error:
            found += error.problems
    return {
        "name": run.name,
        "parent": _described(run, family, family.space.full_subnet())
        | {"hybrid_override_pattern": family.architecture.hybrid_override_pattern},
        "budgets": budgets,
        "serving": {
            "batch_size": run.report.batch_size,
            "sequence_length": run.report.sequence_length,
            "profile": run.report.profile,
        },
        "notes": [*family.notes, *_notes(family)],
        "problems": [{"key": p.key, "message": p.message} for p in found],
    }


def _budget(run: RunConfig, family: Family, name: str) -> dict[str, Any]:
    budget = family.budget(name)
    if name in family.forced:
        subnet, origin = family.forced[name], "forced"
    elif budget.is_full:
        subnet, origin = family.space.full_subnet(), "parent"
    elif budget.kind == "latency_ms":
        words = "a latency budget needs a measured table; make one with `nemo-elastic profile`"
        raise ProblemsError([Problem(f"elastic.budgets.{name}", words)])
    else:
        subnet, origin = propose_uniform(budget_cost(run, family, name), tolerance=run.router.tolerance), "proposed"
    described = _described(run, family, subnet)
    total = parameters(family.layout, family.space.full_subnet())
    return {
        "name": name,
        "target": {"kind": budget.kind, "value": budget.value},
        "origin": origin,
        **described,
        "percent_of_parent": 100 * described["parameters"] / total,
        "subnet": subnet.to_dict(),
        "deployment": deployment(family.layout, subnet),
    }


def budget_cost(run: RunConfig, family: Family, name: str) -> BudgetCost:
    """What a budget limits, under the serving conditions of the `report` section."""
    return BudgetCost(
        family.space,
        family.layout,
        family.budget(name),
        batch_size=run.report.batch_size,
        sequence_length=run.report.sequence_length,
        profile=BYTE_PROFILES[run.report.profile],
    )


def _described(run: RunConfig, family: Family, subnet: Subnet) -> dict[str, Any]:
    serving, layout = run.report, family.layout
    bytes_ = memory(
        layout,
        subnet,
        batch_size=serving.batch_size,
        sequence_length=serving.sequence_length,
        profile=BYTE_PROFILES[serving.profile],
    )
    return {
        "parameters": parameters(layout, subnet),
        "parameters_by_kind": parameters_by_kind(layout, subnet),
        "memory_bytes": bytes_.to_dict(),
        "flops_per_token": flops(layout, subnet, sequence_length=serving.sequence_length) / serving.sequence_length,
        "num_layers": subnet.num_layers,
    }


def _notes(family: Family) -> Sequence[str]:
    drops = any(len(dim.choices) > 1 for name, dim in family.space.dims.items() if name not in WIDTH_DIMS)
    if drops and family.space.depth_is_assumed:
        return ["dropped layers are assumed evenly spread until `nemo-elastic rank` has measured them"]
    return []
