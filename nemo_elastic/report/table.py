"""The result table in the terminal: what every budget kept, what it costs, and how well it speaks."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..kinds import dims
from .budget_rows import BudgetRow, kept_sizes, result_row

TITLE = "Held-out loss (nats per token) of the nested subnet, the extracted child,\nand that child before training"
SHORT = {
    "hidden_size": "hidden",
    **{dim.name: dim.short for dim in dims()},
    "num_layers": "layers",
}


def results_table(results: Mapping[str, Any]) -> Table:
    """A table of `results.json`, 80 columns wide for the tiny family.

    Sizes that no budget changes are left out, what is not known is a dash; `verified` is shown when a budget is not.
    """
    rows = [result_row(entry) for entry in results.get("budgets", ())]
    sizes = [kept_sizes(row) for row in rows]
    shown = [name for name in SHORT if len({kept[name] for kept in sizes}) > 1 or (len(rows) == 1 and sizes[0][name])]
    doubtful = any(row.verified is not True for row in rows)
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, title=TITLE, title_justify="left")
    table.title_style = "dim"
    table.add_column("budget", style="bold", no_wrap=True)
    words = ("parameters", "% of\nparent", "nested", "child", "before", *(["verified"] if doubtful else []))
    for name in (*(SHORT[name] for name in shown), *words):
        table.add_column(name, justify="right", overflow="fold")
    parent = results.get("parent") or {}
    if parent:
        full = {row.percent_of_parent: kept for row, kept in zip(rows, sizes, strict=True)}.get(100, {})
        values = [_count(parent.get("parameters")), "100.00", "-", "-", _loss(parent.get("heldout_loss"))]
        table.add_row("parent", *(full.get(name, "-") for name in shown), *values, style="dim")
    for row, kept in zip(rows, sizes, strict=True):
        table.add_row(
            row.name, *(kept[name] or "-" for name in shown), *_numbers(row), *([_mark(row)] if doubtful else [])
        )
    return table


def _numbers(row: BudgetRow) -> list[str]:
    percent = "-" if row.percent_of_parent is None else f"{row.percent_of_parent:.2f}"
    return [_count(row.parameters), percent, _loss(row.nested), _loss(row.child), _loss(row.before)]


def _mark(row: BudgetRow) -> Text:
    return {True: Text("yes", style="green"), False: Text("NO", style="bold red")}.get(row.verified, Text("-"))


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
