"""How the layouts of `plan --gpus` look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
MOST = 10  # layouts that are shown; --json has all
PARTS = ("weights", "gradients", "optimizer", "teacher", "activations", "hand_over", "at_work", "reserve")


def layout_tables(result: Row) -> list[Any]:
    """Renderables of `layouts`, what the fastest is made of, and what was assumed."""
    rows, gpus = result["layouts"], result["gpus"]
    if not rows:
        return []
    title = (
        f"layouts on {gpus['count']:,} GPUs of {gpus['memory_gb']:g} GB, the fastest first (estimated, never measured)"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("TP", "PP", "CP", "EP", "DP", "micro-batch", "recompute", "GB a GPU", "s/step", "days"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "recompute" else "right")
    for row in rows[:MOST]:
        sizes = (row[f"{name}_parallel_size"] for name in ("tensor_model", "pipeline_model", "context", "expert_model"))
        more = (row["data_parallel_size"], row["micro_batch_size"], row["recompute_granularity"] or "none")
        table.add_row(*map(str, (*sizes, *more)), f"{row['memory_gb']:.1f}", f"{row['step_seconds']:.3g}",
                      f"{row['days']:.3g}")  # fmt: skip
    parts = [table]
    if len(rows) > MOST:
        parts.append(f"and {len(rows) - MOST} more (--json)")
    return [*parts, *_fastest(rows[0]), _assumed(gpus)]


def _fastest(row: Row) -> list[str]:
    """Where the first one's bytes and seconds go."""
    memory = ", ".join(f"{name.replace('_', ' ')} {row['memory_bytes'][name] / 1e9:.1f}" for name in PARTS)
    lines = [f"the first, in GB on its fullest GPU: {memory}"]
    for i, stage in enumerate(row["stages"]):
        seconds = ", ".join(f"{n.replace('_', ' ')} {s:.3g}" for n, s in stage["seconds"].items() if s >= 5e-4)
        lines.append(f"stage {i}, seconds of a step of {stage['micro_batches']:,} micro-batches: {seconds}")
    return lines


def _assumed(gpus: Row) -> str:
    products = f"products {gpus['matmul_tflops']:g} TFLOP/s, memory {gpus['memory_tbs']:g} TB/s"
    passes = f"{gpus['memory_passes']:g} passes, {gpus['reserve_gb']:g} GB in reserve"
    links = f"{gpus['node_gbs']:g} GB/s in nodes of {gpus['node_gpus']}, {gpus['network_gbs']:g} between them"
    return f"assumed (report.gpu.*): {products}, {passes}, {links}"
