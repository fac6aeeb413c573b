"""How `plan` looks on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..kinds import Kind, kinds_by_dim

Row = Mapping[str, Any]
OWN_MARKS = {"proposed": " *", "parent": "", "forced": "", "frozen": ""}  # others get a column that says them


def plan_tables(result: Mapping[str, Any]) -> list[Any]:
    """Renderables of a plan; columns that no budget has a value for are left out."""
    serving, parent = result["serving"], result["parent"]
    title = f"{escape(result['name'])}   {escape(parent['hybrid_override_pattern'])}"
    table = Table(title=title, title_justify="left")
    rows = result["budgets"]
    columns = {h: column for h, column in COLUMNS.items() if h not in OF_KINDS or _has_layers(rows, OF_KINDS[h])}
    columns |= {h: column for h, (key, column) in OPTIONAL.items() if _any_has(rows, key)}
    if any(row["active_parameters"] != row["parameters"] for row in rows):
        columns["active"] = lambda b: f"{b['active_parameters']:,}"
    if any(b["origin"] not in OWN_MARKS for b in result["budgets"]):
        columns = {"budget": columns.pop("budget"), "subnet": lambda b: escape(b["origin"]), **columns}
    else:
        columns |= {"GFLOPs/token": lambda b: f"{b['flops_per_token'] / 1e9:.3f}"}
    for heading in columns:
        left = heading in ("budget", "subnet", "target")
        table.add_column(heading, overflow="fold", justify="left" if left else "right")
    for row in result["budgets"]:
        table.add_row(*(column(row) for column in columns.values()))
    where = f"{serving['batch_size']} x {serving['sequence_length']:,} tokens, {escape(serving['profile'])}"
    details = () if "subnet" in columns else (f"  {escape(b['name'])}: {_deployed(b)}" for b in result["budgets"])
    shown = [table] if result["budgets"] else []
    parts: list[Any] = [*shown, *details, f"parent: {parent['parameters']:,} parameters; memory for {where}"]
    if "latency" in serving:
        parts.append(f"latency: {parent['latency_ms']:.4g} ms for the parent, {escape(serving['latency'])}")
    if any(b["origin"] == "proposed" for b in result["budgets"]):
        parts.append("* proposed by even shrinking; training finds the sizes")
    parts += [f"note: {escape(note)}" for note in result["notes"]]
    parts += [f"[bold red]problem[/] {escape(p['key'])}: {escape(p['message'])}" for p in result["problems"]]
    return parts


def _any_has(rows: list[Row], key: str) -> bool:
    return any(key in row for row in rows)


def _name(row: Row) -> str:
    return escape(row["name"]) + OWN_MARKS.get(row["origin"], "")


def _target(row: Row) -> str:
    target = row["target"]
    value = f"{target['value']:.4g}" if target["value"] < 1000 else f"{target['value']:,.0f}"
    return f"{target['kind']} {value}"


def _size(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{min(value)}..{max(value)}" if value else "-"  # the parent has no layer of this kind


def _sizes_of(kind: Kind) -> Callable[[Row], str]:
    return lambda row: " x ".join(_size(row["subnet"].get(dim.name)) for dim in kind.dims)


def _has_layers(rows: Iterable[Row], kind: Kind) -> bool:
    return any(dim.name in row["subnet"] for row in rows for dim in kind.dims)


def _deployed(row: Row) -> str:
    """Where a child may run, and what its parameters are in."""
    found = row["deployment"]
    tp, pp = (",".join(map(str, found[name])) for name in ("tensor_parallel", "pipeline_parallel"))
    kinds = row["parameters_by_kind"].items()
    shares = ", ".join(f"{name.replace('_', ' ')} {n / row['parameters']:.0%}" for name, n in kinds)
    return f"{shares}; TP {tp}; PP {pp}; {'FP8' if found['fp8'] else 'no FP8'}; {escape(found['hugging_face'])}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "budget": _name,
    "target": _target,
    "off": lambda b: f"{b['error']:+.1%}",
    "hidden": lambda b: _size(b["subnet"]["hidden_size"]),
    **{kind.heading: _sizes_of(kind) for kind in kinds_by_dim()},  # of those that the parent has
    "layers": lambda b: str(b["subnet"]["num_layers"]),
    "parameters": lambda b: f"{b['parameters']:,}",
    "%": lambda b: f"{b['percent_of_parent']:.2f}",
    "memory GB": lambda b: f"{b['memory_bytes']['total'] / 1e9:.3f}",
}
OF_KINDS = {kind.heading: kind for kind in kinds_by_dim()}
OPTIONAL: dict[str, tuple[str, Callable[[Row], str]]] = {
    "ms": ("latency_ms", lambda b: f"{b['latency_ms']:.4g}"),
    "damage": ("damage", lambda b: f"{b['damage']:.4f}" if "damage" in b else ""),
    "held-out loss": ("heldout_loss", lambda b: f"{b['heldout_loss']:.4f}" if "heldout_loss" in b else ""),
}
