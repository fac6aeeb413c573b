"""Write docs/scale.md: the 12B family on 8, 64 and 512 GPUs, by the arithmetic of `plan --gpus`.

    python scripts/scale.py
    python scripts/scale.py --check        # write nothing; compare

tests/test_reference.py runs the comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_elastic.config import load_config
from nemo_elastic.cost.gpu_layout import GpuLayout
from nemo_elastic.cost.held_memory import held_bytes
from nemo_elastic.cost.roofline import gather_seconds, link_gbs
from nemo_elastic.distill.gpu_work import Work
from nemo_elastic.distill.layouts import CONTEXT, layouts, memory_bytes, stage_seconds
from nemo_elastic.distill.training_cost import training_cost
from nemo_elastic.family import family_of
from nemo_elastic.plan.context import shares_heads
from nemo_elastic.plan.of_run import plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
PARENT, EXPERTS = "nemotron_nano_12b_v2.yaml", "star_elastic.yaml"
GPUS, MEMORY_GB = (8, 64, 512), 80.0
LONG = -1  # the curriculum's stage of 49,152 tokens
DAY = 86400
WORDS = {
    "product": "products of matrices", "memory": "memory traffic", "tensor_parallel": "tensor parallelism",
    "context_parallel": "context parallelism", "expert_parallel": "expert parallelism",
}  # fmt: skip
Row = Mapping[str, Any]

HEAD = """# On paper: 8, 64 and 512 GPUs

Made by `python scripts/scale.py`, by the arithmetic of [plan.md](plan.md#what-fits-and-how-fast) and the defaults of
`report.gpu`; do not edit. The Nemotron Nano 12B v2 family (12B, 9B, 6B), {tokens:.0f} B tokens:
{stages}. **Nothing here has been measured on a GPU.**
TP, PP, CP, EP, DP and other words: [concepts.md](concepts.md); `full`, `selective`: what is recomputed. The last
section is of the 30B family with experts.
"""


def page() -> str:
    """The whole page."""
    work = work_of()
    fastest = {n: layouts(work, n, MEMORY_GB)["layouts"][0] for n in GPUS}
    parts = (head(work), fits(work, fastest, f"## What fits {MEMORY_GB:g} GB, and what bounds it"), pipeline(work),
             context(work, fastest), overlap(work, fastest), teacher(work, fastest), experts())  # fmt: skip
    return "\n".join(parts)


def work_of(config: str = PARENT, *overrides: str) -> Work:
    """A published run."""
    run = load_config(config, overrides).config
    family = family_of(run)
    return Work(run, family, {b["name"]: family.space.subnet_from_dict(b["subnet"]) for b in plan(run)["budgets"]})


def head(work: Work) -> str:
    """What is trained."""
    stages = work.run.train.stages
    words = [f"{s.steps:,} steps of {s.global_batch_size:,} x {s.seq_length:,}" for s in stages]
    return HEAD.format(tokens=tokens_of(work) / 1e9, stages=", then ".join(words))


def experts() -> str:
    """The family of a mixture of experts; the fewest GPUs are two nodes."""
    work = work_of(EXPERTS)
    fastest = {n: layouts(work, n, MEMORY_GB)["layouts"][0] for n in (16, *GPUS[1:])}
    least = layouts(work, GPUS[0], MEMORY_GB)["leanest"]["memory_gb"]
    tokens, needs = f"{tokens_of(work) / 1e9:.0f} B tokens", f"the leanest layout needs {least:.0f} GB of each"
    words = f"""
Nemotron 3 Nano 30B-A3B with children of 23B and 12B, {tokens} (`conf/{EXPERTS}`). Of EP ranks each holds
1/EP of every layer's experts, with their gradients. On {GPUS[0]} GPUs {needs}."""
    return fits(work, fastest, f"## The 30B family with experts\n{words}")


def tokens_of(work: Work) -> int:
    """All that a run trains on."""
    return sum(s.steps * s.global_batch_size * s.seq_length for s in work.run.train.stages)


def fits(work: Work, fastest: Mapping[int, Row], title: str) -> str:
    """The fastest layouts, and what bounds each."""
    subnets = {s.budget: s.running.subnet for _, _, row in work.stages[LONG] for s in row}
    flops = training_cost(work.run, work.family, subnets)["flops"]["total"]
    rows, least = [], min(fastest)
    first = fastest[least]["days"] * least
    parts = [k for k in WORDS if any(shares(work, row).get(k) for row in fastest.values())]
    for n, row in fastest.items():
        share = shares(work, row)
        rest = share["gradients"] + share["optimizer"]
        reached = flops / (n * row["days"] * DAY * work.run.report.peak_tflops * 1e12)
        rows.append((n, name(row), f"{row['memory_gb']:.1f}", f"{row['days']:.3g}", f"{first / n / row['days']:.0%}",
                     f"{reached:.0%}", *(f"{share[k]:.1%}" for k in parts),
                     f"{share['bubble'] + share['hand_over']:.1%}", f"{rest:.1%}"))  # fmt: skip
    largest = {max(found, key=found.get) for found in (shares(work, row) for row in fastest.values())}
    most = " and ".join(sorted(WORDS[part] for part in largest))
    titles = ("GPUs", "fastest layout", "GB a GPU", "days", f"speed of a GPU, of that at {least}", "MFU",
              *(k.replace("_", " ").replace("product", "products") for k in parts), "pipeline",
              "gradients, optimizer")  # fmt: skip
    return f"""{title}

{table(titles, rows)}
Shares are of the whole run's seconds; most goes to {most}. MFU: the FLOPs of `plan --train`, recomputation not
counted, over {work.run.report.peak_tflops:g} TFLOP/s a GPU, for `report.mfu` where these estimates hold.
"""


def pipeline(work: Work) -> str:
    """PP 2 against PP 1 at the same tensor parallelism."""
    rows = []
    for n in GPUS[1:]:
        for tp in (4, 8):
            one = full(work, n, tp)
            two = full(work, n, tp, pipeline_model_parallel_size=2)
            a, b = (stage_seconds(work, how, LONG) for how in (one, two))
            bubble, handed = b["seconds"]["bubble"], b["seconds"]["hand_over"]
            reduced = sum(b["seconds"][k] - a["seconds"][k] for k in ("gradients", "optimizer"))
            uneven = b["step_seconds"] - a["step_seconds"] - bubble - handed - reduced
            gb = [memory_bytes(work, how)["total"] / 1e9 for how in (one, two)]
            rows.append((n, tp, b["micro_batches"], f"{gb[0]:.1f}, {gb[1]:.1f}", f"{a['step_seconds']:.2f}",
                         f"{b['step_seconds']:.2f}", f"{bubble:.2f}", f"{uneven:.2f}", f"{handed:.2f}",
                         f"{b['step_seconds'] / a['step_seconds'] - 1:+.1%}"))  # fmt: skip
    titles = ("GPUs", "TP", "micro-batches at PP 2", "GB at PP 1, 2", "s at PP 1", "s at PP 2", "bubble",
              "unequal stages", "sent between stages", "in all")  # fmt: skip
    return f"""## What pipeline parallelism costs

Seconds of a step of 49,152 tokens, full recomputation, micro-batches of 1. 62 layers are 2 x 31, so PP is 1 or 2 here.

{table(titles, rows)}
The last stage has the output layer, and the other one waits for it; the bubble is one micro-batch of the slowest stage,
which costs more the fewer micro-batches a replica has.
"""


def context(work: Work, fastest: Mapping[int, Row]) -> str:
    """CP at the same tensor parallelism, and what it brings."""
    gpu, rows = work.run.report.gpu, []
    for tp in (4, 8):
        for cp in (n for n in CONTEXT if shares_heads(work.family, tp, n)):
            how = full(work, 64, tp, context_parallel_size=cp)
            found, memory = stage_seconds(work, how, LONG), memory_bytes(work, how)
            link = f"{link_gbs(gpu, tp, cp):g}" if cp > 1 else "-"
            rows.append((tp, cp, how.data_parallel_size, f"{memory['activations'] / 1e9:.1f}",
                         f"{memory['total'] / 1e9:.1f}", link, f"{found['step_seconds']:.1f}",
                         f"{found['seconds']['context_parallel']:.1f}"))  # fmt: skip
    best = []
    for n, row in fastest.items():
        alone = layouts(work, n, MEMORY_GB, contexts=(1,))["layouts"][0]
        best.append((n, name(alone), f"{alone['days']:.3g}", name(row), f"{row['days']:.3g}",
                     f"{alone['days'] / row['days'] - 1:.0%}"))  # fmt: skip
    titles = ("TP", "CP", "DP", "GB of activations", "GB a GPU", "GB/s of its link", "s a step", "of that exchange")
    more = ("GPUs", "fastest at CP 1", "days", "fastest", "days", "faster by")
    return f"""## What context parallelism costs

64 GPUs, a step of 49,152 tokens, full recomputation, micro-batches of 1; keys and values are gathered, Mamba's packed
product and result exchanged. What the space allows: beyond TP x CP = 8 ranks would share a group of Mamba heads, whose
15, 14 or 10 heads in a child two ranks cannot always halve.

{table(titles, rows)}
A group inside a node has NVLink, one that leaves it (TP x CP above {gpu.node_gpus}) the network.
Context parallelism alone costs time; it helps where it saves recomputation or tensor parallelism:

{table(more, best)}"""


def overlap(work: Work, fastest: Mapping[int, Row]) -> str:
    """What overlapped reduction of gradients and gathering of weights could save at most."""
    rows = []
    for n, row in fastest.items():
        saved = 0.0
        for stage, found in zip(work.run.train.stages, row["stages"], strict=True):
            parts, step = found["seconds"], found["step_seconds"]
            saved += stage.steps * parts["gradients"]
            one = (step - parts["gradients"] - parts["optimizer"] - parts["bubble"]) / found["micro_batches"]
            few = max(1, round(19 * parts["gradients"] / one))
            rows.append((n, f"{stage.seq_length:,}", found["micro_batches"], f"{step:.3g}", f"{parts['gradients']:.3f}",
                         f"{parts['gradients'] / step:.2%}", few, f"{saved / DAY:.3f}"))  # fmt: skip
    titles = ("GPUs", "tokens", "micro-batches a step", "s a step", "s of reduction", "share",
              "micro-batches where it is 5 %", "days saved so far")  # fmt: skip
    return f"""## What overlapped reduction would bring

Once a step replicas sum gradients and gather weights, and nothing runs beside it: `overlap_grad_reduce` and
`overlap_param_gather` are refused. Wholly overlapped, these would save at most:

{table(titles, rows)}"""


def teacher(work: Work, fastest: Mapping[int, Row]) -> str:
    """Storage of the frozen teacher, and what could make it less."""
    rows, gpu = [], work.run.report.gpu
    for n, row in fastest.items():
        how = how_of(row)
        held, dp = row["memory_bytes"]["teacher"], how.data_parallel_size
        last = how.pipeline_model_parallel_size - 1
        output = held_bytes(work.table_of(how), how, last, cached=True)["teacher"]
        gathered = gather_seconds(gpu, how.tensor_model_parallel_size, dp, held) * row["stages"][LONG]["micro_batches"]
        rows.append((n, name(row), f"{held / 1e9:.2f}", f"{held / 1e9 / row['memory_gb']:.0%}", f"{output / 1e9:.2f}",
                     f"{held / dp / 1e9:.2f}", f"{gathered / row['stages'][LONG]['step_seconds']:.1%}"))  # fmt: skip
    states = tokens_of(work) * 2 * work.family.architecture.hidden_size
    titles = ("GPUs", "layout", "GB", "of the GPU", "GB with a cache", "GB if sharded over replicas", "and time for it")
    return f"""## The teacher's storage

The frozen parent in the dtype of training, bf16: 2 bytes a parameter of the pipeline stage's tensor-parallel shard,
beside 2 + 4 + 12/DP of what is trained. It has no gradient, no fp32 copy, no state of an optimizer.

{table(titles, rows)}
- **Sharing the full member's weights** is exact before the first step alone: that step moves every weight of the full
  member, and nothing is left to share.
- **A cache** (`distill.teacher_cache`) leaves the output weights on the last stage, and is exact. Its states are
  {states / 1e15:.1f} PB here, so it is for short runs that are repeated.
- **The full member as it stands** (`distill.teacher: self`) needs none of it, and is another teacher after the first
  step: [training.md](training.md) has what that costs.
- **Sharding it over replicas**, gathered layer by layer for every micro-batch, would be exact, and is not done: the
  last column is what its gathers would add to a step of 49,152 tokens if nothing ran beside them.
"""


def full(work: Work, gpus: int, tp: int, **sizes: int) -> GpuLayout:
    """Full recomputation, micro-batches of 1, and replicas on all GPUs that are left."""
    how = GpuLayout(tensor_model_parallel_size=tp, sequence_parallel=True, recompute_granularity="full", **sizes)
    return replace(how, data_parallel_size=gpus // how.gpus)


def how_of(row: Row) -> GpuLayout:
    """The layout of a row of `layouts`."""
    names = (f for f in GpuLayout.__dataclass_fields__ if f in row)
    return GpuLayout(**{field: row[field] for field in names})


def shares(work: Work, row: Row) -> dict[str, float]:
    """Parts of the whole run's seconds."""
    total: dict[str, float] = {}
    for stage, found in zip(work.run.train.stages, row["stages"], strict=True):
        for part, seconds in found["seconds"].items():
            total[part] = total.get(part, 0.0) + stage.steps * seconds
    return {part: seconds / sum(total.values()) for part, seconds in total.items()}


def name(row: Row) -> str:
    """TP 4, DP 2, full: what is not 1."""
    names = {"TP": "tensor_model", "PP": "pipeline_model", "CP": "context", "EP": "expert_model", "DP": "data"}
    sizes = {short: row[f"{long}_parallel_size"] for short, long in names.items()}
    words = [f"{short} {size}" for short, size in sizes.items() if size > 1]
    return ", ".join([*words, row["recompute_granularity"] or "no recomputation"])


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:], ""])


def main() -> int:
    """Write or compare; 1 when the page is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is stale")
    check, text = parser.parse_args().check, page()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if check:
        sys.stderr.write("stale: scale.md; run `python scripts/scale.py`\n")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
