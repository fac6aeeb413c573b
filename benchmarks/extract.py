"""Extraction from a large nested checkpoint against copying the bytes it writes: time and memory, as JSON.

    python benchmarks/extract.py [--quick] [--format nemo] [--repetitions 3] [--folder DIR] [--output FILE]

The checkpoint is synthetic (2 GB of bf16, random bytes repeated). A process that has imported everything extracts each
child; `peak_rss_above_baseline_mb` is the high-water mark of its resident set above what it had before. The
copy reads the child's files, writes them elsewhere, syncs and hashes (SHA-256) them. Extract and copy take turns; times
and ratios are medians of the repetitions. `time_ratio_to_copy` is of the worst child, and `cpu_ratio_to_copy` the same
of CPU seconds (what a busy machine disturbs less). `--quick` takes a checkpoint of 30 MB, once: that it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import finish, forget_peak, interleaved, median, memory_bytes, parser, start

GOALS = {"time_ratio_to_copy": 1.5, "peak_rss_above_baseline_mb": 600}
MODEL = {
    "hybrid_override_pattern": "M-M-M*-" * 4,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "vocab_size": 40960,
    "seq_length": 4096,
}
CUT = {"hidden_size": 1664, "ffn_hidden_size": 6144, "mamba_num_heads": 48, "num_attention_heads": 24}
QUICK = {"hidden_size": 256, "ffn_hidden_size": 512, "mamba_num_heads": 8, "num_attention_heads": 8, "vocab_size": 4096}
QUICK_CUT = {"hidden_size": 192, "ffn_hidden_size": 256}


def make(folder: Path, quick: bool) -> None:
    """Write the nested checkpoint, one tensor at a time."""
    model, cut = ({**MODEL, **QUICK}, QUICK_CUT) if quick else (MODEL, CUT)
    import torch

    from nemo_elastic.checkpoint.manifest import Manifest
    from nemo_elastic.config.model_fields import architecture_of
    from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER
    from nemo_elastic.nemo.export.checkpoints import write_nested
    from nemo_elastic.nemo.plain import cpu
    from nemo_elastic.space.budget import Budget
    from nemo_elastic.space.elastic_space import ElasticSpace
    from nemo_elastic.space.layout import ParamLayout

    cpu.install()
    architecture = architecture_of(model)
    noise = torch.randint(
        -(1 << 15), 1 << 15, (1 << 24,), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )

    class Synthetic:
        table = ParamLayout(architecture).table

        def names(self) -> list[str]:
            return list(self.table)

        def shape(self, name: str) -> tuple[int, ...]:
            return self.table[name].shape({})

        def dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

        def read(self, name: str) -> torch.Tensor:
            shape = self.shape(name)
            return (
                noise.repeat(-(-torch.Size(shape).numel() // len(noise)))[: torch.Size(shape).numel()]
                .view(torch.bfloat16)
                .reshape(shape)
            )

    space = ElasticSpace(architecture=architecture, depth_ranking=tuple(range(architecture.num_layers)))
    subnets = {
        "full": space.full_subnet(),
        "shallow": space.subnet(num_layers=21),
        "cut": space.subnet(**cut),
    }
    budgets = {n: Budget(name=n, kind="fraction", value=v) for n, v in (("full", 1.0), ("shallow", 0.8), ("cut", 0.6))}
    manifest = Manifest(model=model, space=space, budgets=budgets, subnets=subnets)
    write_nested(folder, Synthetic(), manifest, tokenizer=DEFAULT_TOKENIZER)


def copy(source: Path, target: Path) -> None:
    """Read, write, sync and hash every file."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as reading, new.open("wb", buffering=0) as writing:
            while block := reading.read(1 << 23):
                writing.write(block)
                digest.update(block)
            os.fsync(writing.fileno())


def measure(folder: Path, format: str, repetitions: int) -> dict:
    """In this process: everything imported, then extract and copy in turn."""
    import torch

    from nemo_elastic.nemo.export.checkpoints import extract, open_nested
    from nemo_elastic.nemo.plain import cpu

    torch.set_num_threads(1)
    if format == "nemo":
        cpu.install()
        import nemo_elastic.mcore.checkpoint.dist_save
        import nemo_elastic.nemo.export.context  # noqa: F401
    children, nested = {}, folder / "nested"
    for budget in open_nested(nested).manifest.subnets:
        child, other, peaks = folder / "child", folder / "copy", []

        def cut(budget: str = budget, child: Path = child, peaks: list = peaks) -> None:
            forget_peak()
            before = memory_bytes("VmRSS")
            extract(nested, budget, child, format=format)
            peaks.append(memory_bytes("VmHWM") - before)

        def clear(name: str, child: Path = child, other: Path = other) -> None:
            for path in (child, other) if name == "extract" else ():
                shutil.rmtree(path, ignore_errors=True)

        runs = {"extract": cut, "copy": lambda c=child, o=other: copy(c, o)}
        times = interleaved(runs, repetitions, warm_up=False, before=clear)
        size = sum(p.stat().st_size for p in child.rglob("*") if p.is_file())
        clear("extract")
        pairs = list(zip(times["extract"], times["copy"], strict=True))
        ratios = [statistics.median(ours[i] / theirs[i] for ours, theirs in pairs) for i in (0, 1)]
        children[budget] = {
            "gigabytes": round(size / 1e9, 3),
            "extract_seconds": round(median(times["extract"]).wall, 3),
            "copy_seconds": round(median(times["copy"]).wall, 3),
            "time_ratio_to_copy": round(ratios[0], 3),
            "cpu_ratio_to_copy": round(ratios[1], 3),
            "peak_rss_above_baseline_mb": round(max(peaks) / 2**20, 1),
        }
    return children


def flags() -> argparse.ArgumentParser:
    words = parser(__doc__, quick="30 MB, once: that it runs", repetitions=3)
    words.add_argument("--format", choices=("nemo", "hf"), default="nemo")
    words.add_argument("--folder", type=Path, help="where to work; needs 7 GB (default: the system's temporary folder)")
    words.add_argument("--step", choices=("make", "measure"), help=argparse.SUPPRESS)
    return words


def main() -> int:
    """Make, measure, print."""
    arguments = start(flags())
    if arguments.step == "make":
        make(arguments.folder / "nested", arguments.quick)
        return 0
    if arguments.step == "measure":
        print(json.dumps(measure(arguments.folder, arguments.format, arguments.repetitions)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="nemo-elastic-extract-") as folder:
        answers = {}
        for step in ("make", "measure"):
            command = [sys.executable, __file__, "--step", step, "--folder", folder, "--format", arguments.format]
            command += ["--repetitions", str(arguments.repetitions)]
            command += ["--quick"] if arguments.quick else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            answers[step] = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        children = json.loads(answers["measure"])
    worst = {key: max(child[key] for child in children.values()) for key in (*GOALS, "cpu_ratio_to_copy")}
    met = all(worst[key] <= goal for key, goal in GOALS.items())
    facts = {"format": arguments.format, "children": children, "goals": GOALS}
    return finish(arguments, {**worst, "met": met, **facts})


if __name__ == "__main__":
    raise SystemExit(main())
