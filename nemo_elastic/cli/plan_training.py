"""How the training part of a plan looks on a terminal: the cost of the curriculum, and the resolved run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]
SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def training_tables(result: Row) -> list[Any]:
    """Renderables of `training`, and of `run` where it was asked for."""
    return [*_cost(result["training"]), *(_run(result["run"]) if result.get("run") else ())]


def count(n: float) -> str:
    """65000000000 -> '65.0 B'."""
    return next((f"{n / scale:.1f} {letter}" for scale, letter in SCALES if n >= scale), f"{n:.0f}")


def size(n: float) -> str:
    """Bytes as GB or MB (powers of ten)."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def _cost(training: Row) -> list[Any]:
    table = Table(title="training (estimated)", title_justify="left")
    for heading in ("stage", "steps", "tokens", "sequence x batch", "budgets drawn", "FLOPs teacher", "students"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("stage", "budgets drawn") else "right")
    for i, stage in enumerate(training["stages"]):
        drawn = ", ".join(f"{escape(name)} {p:.2f}" for name, p in stage["budget_probabilities"].items())
        sizes = f"{stage['seq_length']:,} x {stage['global_batch_size']:,}"
        spent = (f"{stage['flops'][who]:.2e}" for who in ("teacher", "students"))
        table.add_row(str(i), f"{stage['steps']:,}", count(stage["tokens"]), sizes, drawn, *spent)
    assumed, disk = training["assumed"], training["checkpoint_bytes"]
    rate = f"{assumed['mfu']:.0%} of {assumed['peak_tflops']:g} TFLOP/s (report.mfu, report.peak_tflops)"
    total = f"{count(training['tokens'])} tokens, {training['flops']['total']:.3g} FLOPs"
    children = ", ".join(f"{escape(name)} {size(n)}" for name, n in disk["children"].items())
    hours = f"{training['gpu_hours']:,.0f}" if training["gpu_hours"] >= 10 else f"{training['gpu_hours']:.2g}"
    whole = training["disk_bytes"]
    over = f"{size(whole['total'])} at most, {size(whole['training'])} of it training checkpoints"
    cache = f", {size(whole['teacher_cache'])} the teacher's states" if whole["teacher_cache"] else ""
    return [
        table,
        f"in all: {total}: {hours} GPU-hours at {rate}",
        f"on disk: a training checkpoint {size(disk['training'])}, nested {size(disk['nested'])}; children: {children}",
        f"over the whole run: {over}{cache}",
    ]


def _run(run: Row) -> list[Any]:
    lines = [f"trained: {w['what']}, {w['parameters']:,} parameters, lr {w['lr']:g}" for w in run["trained"]]
    lines += [f"frozen:  {w['what']}, {w['parameters']:,} parameters" for w in run["frozen"]]
    lines.append("budgets: " + ", ".join(f"{escape(name)} {how}" for name, how in run["budgets"].items()))
    if run["phases"]:
        phases = (f"{p['phase']} {p['steps']:,} steps from {p['first_step']:,}" for p in run["phases"])
        lines.append("phases:  " + ", ".join(phases))
    layout, saved = run["parallel"], run["checkpoints"]
    sizes = f"TP {layout['tensor_model_parallel_size']} x PP {layout['pipeline_model_parallel_size']}"
    if layout["context_parallel_size"] > 1:
        sizes += f" x CP {layout['context_parallel_size']}"
    experts = layout["expert_model_parallel_size"]
    replicas = layout["largest_data_parallel_size"]
    shared = f", {experts} of which share out experts" if experts > 1 else ""
    lines.append(f"layout:  {sizes} = {layout['gpus_per_replica']} GPUs a replica, up to {replicas:,} replicas{shared}")
    stay = "all stay" if saved["kept"] == saved["count"] else f"{saved['kept']:,} stay (train.keep_checkpoints)"
    lines.append(f"saved:   every {saved['every_steps']:,} steps, {saved['count']:,} checkpoints, {stay}")
    return [*lines, _schedule(run["schedule"])]


def _schedule(points: list[Row]) -> Table:
    router = "tau" in points[0]
    headings = ("step", "tokens before", "stage", "lr", *(("router lr", "phase", "tau", "scale") if router else ()))
    table = Table(title="schedules", title_justify="left")
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="left" if heading == "phase" else "right")
    for p in points:
        row = [f"{p['step']:,}", count(p["tokens_before"]), str(p["stage"]), f"{p['lr']:.2e}"]
        if router:
            row += [f"{p['router_lr']:.2e}", p["phase"], f"{p['tau']:.3f}", f"{p['scale']:.2f}"]
        table.add_row(*row)
    return table
