"""Write docs/gpu.md, and README's table of what ran where, from the result files; `--check` only compares.

    python benchmarks/gpu/pages.py [--check]

A check's row says what was predicted and what its last result was, with the GPU and the commit, or that it never ran.
tests/test_gpu_kit.py runs the comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from registry import ROOT, STAGES, Check, Range, all_checks, paths_of_the_tree
from results import Result, last_results

NEVER = "never run"
BEGIN, END = "<!-- what ran where: begin -->", "<!-- what ran where: end -->"
HEAD = """# On a GPU: what was checked, what was predicted

Made from the files in `benchmarks/gpu/results/` by `python benchmarks/gpu/pages.py`; do not edit.
{summary}

The predictions were written down before anything ran: from other people's figures for the kernels, from counts of
bytes and FLOPs, and from what the same code does on a CPU. A wrong number fails its check; a time that is not as
predicted is marked so. A result never counts where a version in plain torch ran in place of a kernel. A *wait* is a
synchronisation of CPU and GPU, a *ceiling* the best that was measured. Words: [concepts.md](concepts.md); of serving:
[serving.md](serving.md).

```
python benchmarks/gpu/build.py                       # on a machine with pip, once: .gpu_kit/, 21 MB in 10 minutes
benchmarks/gpu/run.sh                                # on the GPU machine, which needs no network
benchmarks/gpu/run.sh --device cpu --tiny            # the rehearsal: the same functions, toy sizes
python benchmarks/gpu/checks.py scan_triton          # one check
python benchmarks/gpu/pages.py                       # this page and README's table
```

The kit, what `build.py` packs into `.gpu_kit/`, is for a machine with Python 3.12, torch 2.11.0 for CUDA 13.0,
transformers and pytest. It brings Megatron-core and NeMo, mamba-ssm's Triton kernels and causal-conv1d, compiled for
sm_90 (H100, H200), fp32 and bf16, width 4. Transformer Engine is not in it: without it stage 8 says so, and runs on a
machine that has it, such as an NGC container. On any other machine `run.sh` takes what is installed. A stage has a time
limit and none stops the others; `MAMBA_DETERMINISTIC=1` is set, so that each kernel takes one autotune configuration
instead of the best.
"""
ROWS: tuple[
    tuple[str, str, Mapping[str, str], str], ...
] = (  # what, on a CPU, {check: what it shows}, what else is true
    (
        "tensor, sequence, pipeline, data parallelism and their products",
        "run in the tests, equal to one process",
        {"two_ranks": "TP 2 is TP 1, two processes on one GPU over gloo"},
        "written, never run",
    ),
    ("distributed optimizer", "runs in the tests, equal to the plain one", {}, "written, never run"),
    (
        "resume at another layout, kill -9, SIGTERM",
        "run in the tests",
        {"pipeline_bf16": "resumed at the same layout"},
        "written, never run",
    ),
    (
        "ranking, training, extraction, verification, report",
        "run in the tests and in the quickstart",
        {"pipeline_fp32": "in fp32", "pipeline_bf16": "rank and train in bf16"},
        "written, never run",
    ),
    ("Slurm, containers", "scripts run with stand-ins for Slurm and docker", {}, "never run"),
    (
        "context and expert parallelism, and their products",
        "run in the tests, equal to one process",
        {},
        "written, never run",
    ),
    ("interleaved pipeline parallelism", "refused with a message", {}, "refused with a message"),
    ("parents of 12B and up", "planned; counts are exact", {}, "never trained"),
)


def shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "; ".join(map(str, value)) if isinstance(value, list) else str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def in_words(name: str, limits: Range) -> str:
    """`name 1 to 2`, `name <= 2`, `name >= 1`."""
    low, high = limits
    if low is None:
        return f"{name} <= {shown(high)}"
    return f"{name} >= {shown(low)}" if high is None else f"{name} {shown(low)} to {shown(high)}"


def as_predicted(value: Any, limits: Range) -> bool:
    low, high = limits
    return isinstance(value, int | float) and (low is None or value >= low) and (high is None or value <= high)


def outcome(check: Check, result: Result | None) -> str:
    """The last cell of a row."""
    if result is None:
        return NEVER
    line, run = result
    where = f"{run.get('gpu', 'GPU')}, {run['commit']}, {run['date'][:10]}"
    if not line["ok"]:
        return f"**failed**: {line.get('error', '').splitlines()[0][:160]} ({where})"
    values = line["values"]
    missed = [name for name, limits in check.predicted.items() if not as_predicted(values.get(name), limits)]
    verdict = f"; **not as predicted**: {', '.join(missed)}" if missed else ""
    return f"{', '.join(f'{n} {shown(v)}' for n, v in values.items())}{verdict} ({where})"


def summary(checks: Mapping[str, Check], results: Mapping[str, Result]) -> str:
    """How much of it has run, in a sentence."""
    ran = [name for name in checks if name in results]
    if not ran:
        return f"**None of the {len(checks)} checks has ever run on a GPU.**"
    failed = [name for name in ran if not results[name].line["ok"]]
    return f"Of {len(checks)} checks {len(ran)} ran on a GPU, and {len(failed)} of them failed."


def page(checks: Mapping[str, Check], results: Mapping[str, Result]) -> str:
    """docs/gpu.md."""
    parts = [HEAD.format(summary=summary(checks, results))]
    for stage, (about, seconds) in STAGES.items():
        parts.append(
            f"## Stage {stage}: {about}\n\nAt most {seconds} s.\n\n| check | predicted | last result |\n|---|---|---|"
        )
        for check in (c for c in checks.values() if c.stage == stage):
            predicted = "; ".join(in_words(*item) for item in check.predicted.items()) or "passes"
            what = f"`{check.name}`: {check.about}"
            parts[-1] += "\n" + " | ".join(
                (f"| {what}", predicted, f"{cell(outcome(check, results.get(check.name)))} |")
            )
        parts[-1] += "\n"
    return "\n".join(parts)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(checks: Mapping[str, Check], results: Mapping[str, Result]) -> str:
    """README's table, between its markers."""
    lines = ["| | CPU, gloo | GPU |", "|---|---|---|"]
    for what, on_cpu, shows, otherwise in ROWS:
        passed: dict[str, list[str]] = {}
        for name, words in shows.items():
            if name in results and results[name].line["ok"]:
                passed.setdefault(results[name].run.get("gpu", "GPU"), []).append(words)
        found = "; ".join(f"{gpu}: {', '.join(words)}" for gpu, words in passed.items())
        lines.append(f"| {what} | {on_cpu} | {f'{found}; else {otherwise}' if found else otherwise} |")
    last = f"{summary(checks, results)} [docs/gpu.md](docs/gpu.md) has each, and what was predicted."
    return "\n".join((BEGIN, *lines, "", last, END))


def pages() -> dict[Path, str]:
    """File -> what it should say."""
    paths_of_the_tree()
    checks, results = all_checks(), last_results()
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return {ROOT / "docs" / "gpu.md": page(checks, results), readme: before + table(checks, results) + after}


def main() -> int:
    """1 when `--check` finds a page that is not current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments, old = parser.parse_args(), []
    for path, text in pages().items():
        if path.is_file() and path.read_text() == text:
            continue
        old.append(path.name)
        if not arguments.check:
            path.write_text(text)
    print(f"not current: {', '.join(old)}" if arguments.check and old else "docs/gpu.md and README.md are current")
    return int(arguments.check and bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
