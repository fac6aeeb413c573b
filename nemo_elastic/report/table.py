"""The result table in the terminal: what every budget kept, what it costs, and how well it speaks."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .budget_rows import BudgetRow, kept_sizes, result_row

SHORT = {
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "mamba_num_heads": "mamba\nheads",
    "mamba_head_dim": "head\ndim",
    "num_attention_heads": "attn\nheads",
    "num_layers": "layers",
}


def results_table(results: Mapping[str, Any]) -> Table:
    """A table of `results.json`; columns of what no budget has are left out, what is not known is a dash."""
    rows = [result_row(entry) for entry in results.get("budgets", ())]
    parent = results.get("parent") or {}
    full = {name: size for row in rows if row.percent_of_parent == 100 for name, size in kept_sizes(row).items()}
    shown = [name for name in SHORT if any(kept_sizes(row)[name] for row in rows)]
    table = Table(box=SIMPLE_HEAD, title="Held-out loss in nats per token", title_justify="left", title_style="dim")
    table.add_column("budget", style="bold", no_wrap=True)
    for name in shown:
        table.add_column(SHORT[name], justify="right")
    for name in ("parameters", "% of\nparent", "nested", "child", "before\ntraining", "verified"):
        table.add_column(name, justify="right", no_wrap=True)
    if parent:
        loss = _loss(parent.get("heldout_loss"))
        sizes = [full.get(name, "-") for name in shown]
        values = [_count(parent.get("parameters")), "100.00", "-", loss, "-", ""]
        table.add_row("parent", *sizes, *values, style="dim", end_section=True)
    for row in rows:
        sizes = kept_sizes(row)
        table.add_row(row.name, *(sizes[name] or "-" for name in shown), *_numbers(row))
    return table


def _numbers(row: BudgetRow) -> list[str | Text]:
    percent = "-" if row.percent_of_parent is None else f"{row.percent_of_parent:.2f}"
    mark = {True: Text("yes", style="green"), False: Text("NO", style="bold red")}.get(row.verified, Text("-"))
    return [_count(row.parameters), percent, _loss(row.nested), _loss(row.child), _loss(row.before), mark]


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
