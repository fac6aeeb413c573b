"""`plan`: what every budget will be, on a laptop, in a second."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import configuration, folders, verb_parser

EXAMPLES = """examples:
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --json report.sequence_length=32768 report.profile=fp8
  nemo-elastic plan --config conf/my_parent.yaml train.tensor_model_parallel_size=4

exit code 2 when the plan has problems; it is printed all the same"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "sizes, parameters, memory, FLOPs and legality of every budget"
    verb_parser(subparsers, "plan", run, help, ("--config", "--json"), epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 2 when it has problems."""
    from ..plan import plan

    folders(arguments)
    result = plan(configuration(arguments).config)
    if arguments.json:
        arguments.answer.json(result)
    else:
        arguments.answer.render(*_tables(result))
    return 2 if result["problems"] else 0


def _tables(result: dict[str, Any]) -> list[Any]:
    from rich.markup import escape
    from rich.table import Table

    serving, parent = result["serving"], result["parent"]
    where = f"{serving['batch_size']} x {serving['sequence_length']:,} tokens, {serving['profile']}"
    table = Table(title=f"{escape(result['name'])}   {escape(parent['hybrid_override_pattern'])}", title_justify="left")
    headings = ("budget", "target", "hidden", "ffn", "mamba", "q heads", "layers", "parameters", "%",
                "memory GB", "GFLOPs/token", "runs at")  # fmt: skip
    for heading in headings:
        table.add_column(
            heading,
            no_wrap=heading != "runs at",
            justify="left" if heading in ("budget", "target", "runs at") else "right",
        )
    for b in result["budgets"]:
        s, target = b["subnet"], b["target"]
        value = f"{target['value']:.4g}" if target["value"] < 1000 else f"{target['value']:,.0f}"
        mark = "" if b["origin"] != "proposed" else " *"
        table.add_row(
            escape(b["name"]) + mark, f"{target['kind']} {value}", _size(s["hidden_size"]), _size(s["ffn_hidden_size"]),
            f"{_size(s['mamba_num_heads'])} x {s['mamba_head_dim']}", _size(s["num_attention_heads"]),
            str(s["num_layers"]), f"{b['parameters']:,}", f"{b['percent_of_parent']:.2f}",
            f"{b['memory_bytes']['total'] / 1e9:.3f}", f"{b['flops_per_token'] / 1e9:.3f}", _deployed(b["deployment"]),
        )  # fmt: skip
    parts: list[Any] = [table, f"parent: {parent['parameters']:,} parameters; memory for {where}"]
    if any(b["origin"] == "proposed" for b in result["budgets"]):
        parts.append("* proposed by even shrinking; training learns the sizes")
    parts += [f"note: {escape(note)}" for note in result["notes"]]
    parts += [f"[bold red]problem[/] {escape(p['key'])}: {escape(p['message'])}" for p in result["problems"]]
    return parts


def _deployed(found: dict[str, Any]) -> str:
    tp, pp = (",".join(map(str, found[name])) for name in ("tensor_parallel", "pipeline_parallel"))
    return f"TP {tp}; PP {pp}; {'FP8' if found['fp8'] else 'no FP8'}; HF: {found['hugging_face']}"


def _size(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{min(value)}..{max(value)}"
