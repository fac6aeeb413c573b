"""How `data` looks on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

BAR = 24  # characters of the longest bar
SHOWN = 800  # characters of a span of a sample


def data_tables(found: Mapping[str, Any]) -> list[Any]:
    """Renderables of a preview."""
    parts: list[Any] = [_sources(found["sources"])]
    for source in found["sources"]:
        parts += _lengths(source)
    if found["stages"]:
        parts.append(_stages(found["stages"]))
    for sample in found["samples"]:
        parts += _sample(sample)
    return parts + [f"note: {escape(note)}" for note in found["notes"]]


def _count(value: int, whole: bool) -> str:
    return f"{value:,}" if whole else f"≥ {value:,}"


def _sources(sources: list[Mapping[str, Any]]) -> Table:
    table = Table(title="what training reads", title_justify="left")
    for name in ("source", "kind", "share", "files", "MB", "documents", "tokens", "held out", "with loss"):
        table.add_column(name, justify="left" if name in ("source", "kind") else "right", overflow="fold")
    for row in sources:
        held, loss = row["heldout_tokens"] / max(row["tokens"], 1), row.get("tokens_with_loss")
        table.add_row(
            escape(row["path"]), row["kind"], f"{row['share']:.1%}", f"{row['files']:,}", f"{row['bytes'] / 1e6:,.1f}",
            _count(row["documents"], row["whole"]), _count(row["tokens"], row["whole"]), f"{held:.1%}",
            "all" if loss is None else f"{loss / max(row['tokens'], 1):.1%}",
        )  # fmt: skip
    return table


def _lengths(source: Mapping[str, Any]) -> list[Any]:
    rows = source["lengths"]
    what = "conversations" if source["kind"] == "conversations" else "documents"
    parts: list[Any] = [f"[bold]{escape(source['path'])}[/]: {what} by tokens"]
    most = max((row["documents"] for row in rows), default=1)
    for row in rows:
        bar = "█" * max(1, round(BAR * row["documents"] / most)) if row["documents"] else ""
        parts.append(f"  {row['from']:>9,} .. {row['to'] - 1:<9,} {bar:<{BAR}} {row['documents']:,}")
    for at in source["at"]:
        of_all = f"of all {_count(source['documents'], source['whole'])}"  # held out ones too
        if "cut" in at:
            words = f"{at['cut']:,} {of_all} are cut, {at['left_out']:,} are left out (their loss begins behind it)"
        else:
            words = f"{at['longer']:,} {of_all} are longer than a window"
        parts.append(f"  at seq_length {at['seq_length']:,}: {words}")
    if source.get("without_loss"):
        parts.append(f"  {source['without_loss']:,} have no assistant's token and are left out")
    return parts


def _stages(stages: list[Mapping[str, Any]]) -> Table:
    table = Table(title="stages", title_justify="left")
    for name in ("steps", "seq_length", "source", "samples", "tokens", "epochs"):
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for stage in stages:
        for i, row in enumerate(stage["sources"]):
            head = (f"{stage['steps']:,}", f"{stage['seq_length']:,}") if not i else ("", "")
            epochs = row.get("epochs")
            shown = "unknown" if "epochs" not in row else "no sample" if epochs is None else f"{epochs:.3g}"
            table.add_row(*head, escape(row["path"]), f"{row['samples']:,}", f"{row['tokens']:,}", shown)
    return table


def _sample(sample: Mapping[str, Any]) -> list[Any]:
    of = f" ({escape(sample['source'])})" if "source" in sample else ""
    text, tokens = Text(), sum(span["tokens"] for span in sample["spans"])
    for span in sample["spans"]:
        words = _shortened(span["text"])
        text.append(words if span["loss"] else f"⟨{words}⟩", style="" if span["loss"] else "dim")
    head = f"{tokens:,} tokens" + (f" and {sample['padding']:,} of padding" if sample["padding"] else "")
    return [f"[bold]sample {sample['sample']}[/]{of}: {head}", text]


def _shortened(text: str) -> str:
    left_out = len(text) - SHOWN
    if left_out <= 0:
        return text
    return f"{text[: SHOWN // 2]} [... {left_out:,} characters; --json has them ...] {text[-(SHOWN // 2) :]}"
