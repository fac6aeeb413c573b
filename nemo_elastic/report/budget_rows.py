"""One row per budget, the same for the page, the CSV, the figures and the terminal.

`results.json` counts where it is there; before it exists, a row is made from the last validation and the exact cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..family import parse_budget
from ..problems import ProblemsError
from ..space.dims import DEPTH, WIDTH_DIMS
from .run_folder import RunFolder

KEPT = (*WIDTH_DIMS, DEPTH)


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """What is known of one budget. Losses are nats per token on held-out text; None: not known.

    Attributes:
        active_parameters: of one token, where that is fewer than all.
        before: the child as it was before training (zero-shot).
        nested: the subnet inside the elastic model; `child`: the extracted model, loaded on its own.
        source: `results` or `log`.
    """

    name: str
    target: str = ""
    subnet: Mapping[str, Any] | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    percent_of_parent: float | None = None
    memory_bytes: float | None = None
    before: float | None = None
    nested: float | None = None
    child: float | None = None
    verified: bool | None = None
    max_abs_difference: float | None = None
    source: str = "log"

    @property
    def final(self) -> float | None:
        """The best known loss: the child's own, else the nested subnet's."""
        return self.nested if self.child is None else self.child

    @property
    def layers(self) -> tuple[int, ...]:
        """Kept layers of the parent."""
        return tuple((self.subnet or {}).get("layers") or ())


def budget_rows(run: RunFolder) -> list[BudgetRow]:
    """A row per budget in the configuration's order."""
    by_name = {b["name"]: b for b in run.results.get("budgets", ()) if isinstance(b, Mapping) and "name" in b}
    rows = [
        _with_before(run, result_row(by_name[name], _target_of_config(run, name)))
        if name in by_name
        else _logged_row(run, name)
        for name in run.budget_names
    ]
    return [_with_active(run, row) for row in rows]


def _with_active(run: RunFolder, row: BudgetRow) -> BudgetRow:
    subnet = run.subnet(row.subnet)
    active = None if subnet is None else run.active_parameters(subnet)
    return row if active is None or active == row.parameters else replace(row, active_parameters=active)


def _with_before(run: RunFolder, row: BudgetRow) -> BudgetRow:
    """`verify` measures nothing before training: the end of training did, or the first validation of that subnet."""
    return row if row.before is not None else replace(row, before=loss_before(run, row.name, row.subnet))


def loss_before(run: RunFolder, name: str, subnet: Any) -> float | None:
    """Held-out loss of this subnet with the parent's weights, where it was measured."""
    measured = run.zero_shot.get("budgets", {}).get(name, {})
    if measured and measured["subnet"] == subnet:
        return measured["loss"]
    first = run.validation[0] if run.validation and run.validation[0]["step"] == 0 else {}
    return first.get("losses", {}).get(name) if first.get("subnets", {}).get(name) == subnet else None


def result_row(entry: Mapping[str, Any], target: str = "") -> BudgetRow:
    """A row of `results.json`; its memory is a number or the terms of one with their `total`."""
    memory = entry.get("memory_bytes")
    return BudgetRow(
        name=entry["name"],
        target=target_words(entry.get("target")) or target,
        subnet=entry.get("subnet"),
        parameters=entry.get("parameters"),
        percent_of_parent=entry.get("percent_of_parent"),
        memory_bytes=memory.get("total") if isinstance(memory, Mapping) else memory,
        before=entry.get("heldout_before"),
        nested=entry.get("heldout_nested"),
        child=entry.get("heldout_child"),
        verified=entry.get("verified"),
        max_abs_difference=entry.get("max_abs_difference"),
        source="results",
    )


def _logged_row(run: RunFolder, name: str) -> BudgetRow:
    last = run.validation[-1] if run.validation else {}
    values = last.get("subnets", {}).get(name)
    subnet, full = run.subnet(values), parent_parameters(run)
    count = run.parameters(subnet) if subnet else None
    return BudgetRow(
        name=name,
        target=_target_of_config(run, name),
        subnet=values,
        parameters=count,
        percent_of_parent=100 * count / full if count and full else None,
        memory_bytes=run.memory_bytes(subnet) if subnet else None,
        before=loss_before(run, name, values),
        nested=last.get("losses", {}).get(name),
    )


def parent_parameters(run: RunFolder) -> int | None:
    """The parent's count, as measured or as the configuration says."""
    measured = (run.results.get("parent") or {}).get("parameters")
    if measured is not None or not run.layout:
        return measured
    return run.parameters(run.subnet({}))


def parent_loss(run: RunFolder) -> float | None:
    """Held-out loss of the parent as it was given: measured, or the full budget's before training."""
    measured = (run.results.get("parent") or {}).get("heldout_loss")
    if measured is not None or run.family is None or not run.validation or run.validation[0]["step"] != 0:
        return measured
    full = [b.name for b in run.family.budgets if b.is_full]
    return run.validation[0].get("losses", {}).get(full[0]) if full else None


def _target_of_config(run: RunFolder, name: str) -> str:
    if not run.config or name not in run.config.elastic.budgets:
        return ""
    try:
        budget = parse_budget(name, run.config.elastic.budgets[name])
    except ProblemsError:
        return ""
    return target_words({"kind": budget.kind, "value": budget.value})


def target_words(target: Any) -> str:
    """`{'kind': 'fraction', 'value': 0.75}` -> `75% of parameters`."""
    if not isinstance(target, Mapping) or not isinstance(target.get("value"), int | float):
        return ""
    kind, value = target.get("kind"), target["value"]
    if kind == "fraction":
        return f"{100 * value:.4g}% of parameters"
    if kind in ("parameters", "active_parameters"):
        return f"{value:,.0f} {kind.replace('_', ' ')}"
    unit = {"memory_gb": "GB of memory", "latency_ms": "ms"}.get(str(kind), str(kind))
    return f"{value:g} {unit}"


def size_words(value: Any) -> str:
    """A kept size: `384`, or `256-512` where layers differ."""
    if isinstance(value, list | tuple) and value:
        low, high = min(value), max(value)
        return f"{low:,}" if low == high else f"{low:,}-{high:,}"
    return "" if value is None or value == [] else f"{value:,}"


def kept_sizes(row: BudgetRow) -> dict[str, str]:
    """Words per elastic dim, depth included."""
    return {name: size_words((row.subnet or {}).get(name)) for name in KEPT}
