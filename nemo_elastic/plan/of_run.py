"""What a configured family will be, before a GPU-hour is spent: sizes, parameters, memory, FLOPs, legality.

Before `rank` and `train` have run, the sizes of a budget are a proposal (an even shrink that meets the target) and
the dropped layers are an assumption; both are marked as such. No torch here: this runs on a laptop in a second.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config.parent_files import BUILTIN, folder_of, parent_files
from ..config.sections import RunConfig
from ..cost.budget import BudgetCost
from ..cost.conditions import Serving, serving_of
from ..cost.counts import active_parameters, flops, memory, parameters, parameters_by_kind
from ..family import Family, family_of, parallel_problems
from ..problems import Problem, ProblemsError
from ..shapes.candidates import Candidate
from ..shapes.search import propose_uniform
from ..space.alignment import alignment_notes, convolution_notes, padding_notes
from ..space.budget import Budget
from ..space.dims import WIDTH_DIMS
from ..space.subnet import Subnet
from .context import context_problems
from .deployment import deployment, fp8_problems, low_precision_problems


def plan(
    run: RunConfig,
    depth_ranking: tuple[int, ...] | None = None,
    *,
    family: Family | None = None,
    racing: Mapping[str, Sequence[Candidate]] | None = None,
) -> dict[str, Any]:
    """The plan as plain values (`plan --json` prints exactly this). Its `problems` are not raised.

    Args:
        family: of `run`, where it has been made.
        racing: who races for each budget, where there is a ranking: the first stands for all.

    Raises:
        ProblemsError: when not even the parent can be described.
    """
    found: list[Problem] = []
    try:
        family = family or family_of(run, depth_ranking)
    except ProblemsError as error:
        found += error.problems
        bare = replace(run.elastic, dims={}, budgets={}, subnets={})
        family = family_of(replace(run, elastic=bare))
    found += parallel_problems(family.architecture, run.train, family.space.groups)
    found += context_problems(family, run.train)
    if (run.parent.path or "").startswith(BUILTIN):  # others may be on a machine that this is not
        try:
            folder_of(str(run.parent.path))
        except ProblemsError as error:
            found += error.problems
    found += low_precision_problems(run.model)
    try:
        serving = serving_of(run.report, family.architecture)
    except ProblemsError as error:
        found += error.problems
        serving = serving_of(replace(run.report, latency_table=None))
    no_table = run.report.latency_table is not None and serving.latency is None  # said once, not per budget
    budgets = []
    for budget in family.budgets:
        if no_table and budget.kind == "latency_ms":
            continue
        try:
            budgets.append(_budget(run, family, serving, budget, (racing or {}).get(budget.name, ())))
            if run.model.get("fp8"):
                subnet = family.space.subnet_from_dict(budgets[-1]["subnet"])
                found += fp8_problems(family.layout, subnet, f"elastic.budgets.{budget.name}")
        except ProblemsError as error:
            found += error.problems
    tp = run.train.tensor_model_parallel_size
    aligned = [
        *alignment_notes(family.space, tp),
        *convolution_notes(family.space, tp, run.train.context_parallel_size),
        *padding_notes(family.architecture, tp),
    ]
    return described_plan(run.name, family, serving, budgets) | {
        "notes": [*_left_out(run), *family.notes, *_notes(family), *aligned, *misses(budgets, run.router.tolerance)],
        "problems": [{"key": p.key, "message": p.message} for p in dict.fromkeys(found)],
    }


def described_plan(
    name: str, family: Family, serving: Serving, budgets: Sequence[Mapping[str, Any]], notes: Iterable[str] = ()
) -> dict[str, Any]:
    """The plan's frame around described budgets: parent, serving conditions; no problems."""
    parent = described(family, serving, family.space.full_subnet())
    conditions = {
        "batch_size": serving.batch_size,
        "sequence_length": serving.sequence_length,
        "profile": serving.profile_name,
    }
    if serving.latency is not None:
        conditions["latency"] = serving.latency.describe()
    return {
        "name": name,
        "parent": parent | {"hybrid_override_pattern": family.architecture.hybrid_override_pattern},
        "budgets": list(budgets),
        "serving": conditions,
        "notes": list(notes),
        "problems": [],
    }


def _budget(
    run: RunConfig, family: Family, serving: Serving, budget: Budget, racing: Sequence[Candidate]
) -> dict[str, Any]:
    if budget.is_full:
        subnet, origin = family.space.full_subnet(), "parent"
    elif budget.name in family.forced:
        given = budget.name in run.elastic.subnets
        subnet, origin = family.forced[budget.name], "forced" if given else "frozen"
    elif racing:
        subnet, origin = racing[0].subnet, f"first of {len(racing)} that race" if len(racing) > 1 else "search"
    else:
        subnet, origin = (
            propose_uniform(budget_cost(family, serving, budget), tolerance=run.router.tolerance),
            "proposed",
        )
    return budget_row(family, serving, budget, subnet, origin)


def budget_row(family: Family, serving: Serving, budget: Budget, subnet: Subnet, origin: str) -> dict[str, Any]:
    """One budget with the subnet that answers it, as plain values. `error`: relative to the target, exact."""
    about = described(family, serving, subnet)
    cost = budget_cost(family, serving, budget)
    total = parameters(family.layout, family.space.full_subnet())
    return {
        "name": budget.name,
        "target": {"kind": budget.kind, "value": budget.value},
        "origin": origin,
        "error": cost.error(cost.of(subnet)),
        **about,
        "percent_of_parent": 100 * about["parameters"] / total,
        "subnet": subnet.to_dict(),
        "deployment": deployment(family.layout, subnet, family.model),
    }


def budget_cost(family: Family, serving: Serving, budget: Budget) -> BudgetCost:
    """What a budget limits, under the serving conditions of the `report` section.

    Raises:
        ProblemsError: a latency budget without a table.
    """
    return BudgetCost(family.space, family.layout, budget, **serving.conditions)


def described(family: Family, serving: Serving, subnet: Subnet) -> dict[str, Any]:
    """Sizes and costs of one subnet; `latency_ms` when there is a measured table."""
    layout, length = family.layout, serving.sequence_length
    about = {
        "parameters": parameters(layout, subnet),
        "active_parameters": active_parameters(layout, subnet),
        "parameters_by_kind": parameters_by_kind(layout, subnet),
        "memory_bytes": memory(layout, subnet, **serving.memory_conditions).to_dict(),
        "flops_per_token": flops(layout, subnet, sequence_length=length) / length,
        "num_layers": subnet.num_layers,
    }
    if serving.latency is not None:
        anything = Budget(name="latency", kind="latency_ms", value=1.0)
        about["latency_ms"] = budget_cost(family, serving, anything).of(subnet)
    return about


def misses(budgets: Iterable[Mapping[str, Any]], tolerance: float) -> list[str]:
    """Budgets that their subnet does not meet: a budget is a limit, and what stays below it is given away."""
    found = []
    for b in budgets:
        if abs(b["error"]) > tolerance:
            side = "below" if b["error"] < 0 else "ABOVE"
            words = f"its {b['origin']} subnet is {abs(b['error']):.1%} {side} the budget"
            found.append(f"{b['name']}: {words} (router.tolerance {tolerance:g})")
    return found


def _left_out(run: RunConfig) -> list[str]:
    """What of the parent its children are made without."""
    said = parent_files(run.parent.path) if run.parent.path else None
    return [said.left_out] if said and said.left_out else []


def _notes(family: Family) -> Sequence[str]:
    drops = any(len(dim.choices) > 1 for name, dim in family.space.dims.items() if name not in WIDTH_DIMS)
    if drops and family.space.depth_is_assumed:
        return ["dropped layers are assumed evenly spread until `nemo-elastic rank` has measured them"]
    return []
