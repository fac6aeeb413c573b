"""Time and peak memory of the distillation losses against the plain fp32 formula and ModelOpt's `LogitsKLLoss`.

    python benchmarks/kd_loss.py [--tokens 256] [--fused-tokens 1024] [--hidden 256] [--vocab 131072] [--tp 1 2]
                                 [--quick] [--repetitions N] [--output FILE]

Plain: `sum exp(lt) (lt - ls)` with l = log-softmax (vocabulary-parallel at TP2), forward and backward through autograd.
Peak memory is what a forward and backward add to the inputs, the student's gradient included: the high-water mark of
the process on Linux, the allocator's on a GPU; the largest of the ranks. `fused_*` compares head + loss with head +
plain formula; the gradient of the student's head, which both must make, is taken off both. Every candidate runs in
turn with the others, in the same processes; times are the least of the repetitions, of CPU seconds on a CPU (other
work on the machine disturbs these less; `wall_*` are there as well).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_autograd
import torch.multiprocessing as mp
from harness import finish, forget_peak, interleaved, memory_bytes, parser, start, timed, timer

from nemo_elastic.config.sections import AUTO, DistillConfig
from nemo_elastic.distill.fused import fused_kd_loss
from nemo_elastic.distill.losses import kd_loss

GOALS = {"memory_ratio": 0.25, "time_ratio": 0.45, "fused_memory_ratio": 0.06}
SETTINGS = ("tokens", "fused_tokens", "hidden", "vocab", "chunk_tokens", "tp", "repetitions", "device")


def plain_kl(student: torch.Tensor, teacher: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The straightforward formula, summed over tokens."""
    log_s, log_t = log_softmax(student, group), log_softmax(teacher, group).detach()
    loss = (log_t.exp() * (log_t - log_s)).sum(-1)
    return (loss if group is None else dist_autograd.all_reduce(loss, group=group) / dist.get_world_size(group)).sum()


def log_softmax(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Over a vocabulary that may be split."""
    if group is None:
        return torch.log_softmax(logits.float(), -1)
    highest = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits.float() - highest
    return shifted - dist_autograd.all_reduce(shifted.exp().sum(-1, keepdim=True), group=group).log()


class Meter:
    """Peak bytes above the start, CPU seconds and wall seconds of a call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], None]) -> tuple[float, float, float]:
        gc.collect()
        if self.device.type == "cpu":
            forget_peak()
            before = memory_bytes("VmRSS")
            taken = timed(run)
            return memory_bytes("VmHWM") - before, taken.cpu, taken.wall
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wall = timer(self.device)(run).wall
        return torch.cuda.max_memory_allocated() - before, wall, wall


def modelopt_loss(tp: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """ModelOpt's loss, or None where it is not installed."""
    try:
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
    except ImportError as error:
        print(f"modelopt cannot be measured: {error}", file=sys.stderr)
        return None
    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=False))
    return lambda student, teacher: loss(student, teacher)[0].sum()


def candidates(args: argparse.Namespace, tp: int, rank: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward. Inputs are made once and stay alive."""
    group = dist.group.WORLD if tp > 1 else None
    vocab, config = args.vocab // tp, DistillConfig(chunk_tokens=args.chunk_tokens)
    g = torch.Generator().manual_seed(rank)
    if args.part == "logits":
        student = (torch.randn(args.tokens, 1, vocab, generator=g) * 2).to(device).requires_grad_()
        teacher = (torch.randn(args.tokens, 1, vocab, generator=g) * 2).to(device)
        other = modelopt_loss(tp)

        def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
            def run() -> None:
                loss().backward()
                student.grad = None

            return run

        found = {
            "plain": step(lambda: plain_kl(student, teacher, group)),
            "ours": step(lambda: kd_loss(student, teacher, config, group=group).total),
        }
        if other is not None:
            found["modelopt"] = step(lambda: other(student, teacher))
        return found
    shared = torch.Generator().manual_seed(99)  # hidden states are the same on every rank
    hidden, teacher_hidden = (
        torch.randn(args.fused_tokens, args.hidden, generator=shared).to(device) for _ in range(2)
    )
    weight, teacher_weight = (
        (torch.randn(vocab, args.hidden, generator=g) / args.hidden**0.5).to(device) for _ in range(2)
    )
    hidden.requires_grad_()
    weight.requires_grad_()

    def plain() -> None:
        plain_kl(hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), group).backward()
        if group is not None:
            dist.all_reduce(hidden.grad, group=group)
        hidden.grad = weight.grad = None

    def ours() -> None:
        fused_kd_loss(hidden, weight, teacher_hidden, teacher_weight, config, group=group).total.backward()
        hidden.grad = weight.grad = None

    return {"plain": plain, "ours": ours}


def worker(rank: int, tp: int, args: argparse.Namespace, out: str) -> None:
    """One rank: measures every candidate in turn, rank 0 writes the largest over the ranks."""
    torch.set_num_threads(1)
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if tp > 1:
        backend, meeting = "nccl" if args.device == "cuda" else "gloo", f"file://{Path(out).with_name('meeting')}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=tp)
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tp)
    results, meter = {}, Meter(device)
    for part in ("logits", "fused"):
        args.part = part
        runs, head = candidates(args, tp, rank, device), args.vocab // tp * args.hidden * 4 if part == "fused" else 0
        found = interleaved(runs, args.repetitions, measure=meter)
        best = {}
        for name, rows in found.items():
            peaks, cpu, wall = zip(*rows, strict=True)
            # In a quick run the peak may lie within what the process had before: less than a page cannot be seen.
            best[name] = [max(max(peaks) - head, PAGESIZE), min(cpu), min(wall)]
        results[part] = best
        del runs
    values = torch.tensor([v for part in results.values() for row in part.values() for v in row], dtype=torch.float64)
    if tp > 1:
        values = values.to(device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        dist.destroy_process_group()
    if rank == 0:
        rest = iter(values.tolist())
        for part in results.values():
            for name in part:
                part[name] = dict(
                    zip(("bytes", "seconds", "wall_seconds"), (next(rest) for _ in range(3)), strict=True)
                )
        Path(out).write_text(json.dumps(results))


def case(args: argparse.Namespace, tp: int) -> dict:
    """Ratios to the plain formula at one tensor-parallel size."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        mp.spawn(worker, (tp, args, str(out)), nprocs=tp)
        measured = json.loads(out.read_text())
    found = {"tp": tp}
    for prefix, part, name in (
        ("", "logits", "ours"),
        ("fused_", "fused", "ours"),
        ("modelopt_", "logits", "modelopt"),
    ):
        if name in measured[part]:
            plain, own = measured[part]["plain"], measured[part][name]
            found |= {
                f"{prefix}memory_ratio": own["bytes"] / plain["bytes"],
                f"{prefix}time_ratio": own["seconds"] / plain["seconds"],
                f"{prefix}wall_time_ratio": own["wall_seconds"] / plain["wall_seconds"],
            }
    return {**found, "measured": measured}


def flags() -> argparse.ArgumentParser:
    words = parser(
        __doc__, quick="few tokens, a small vocabulary, TP 1: that it runs", repetitions=3, threads=None, device=True
    )
    words.add_argument("--tokens", type=int, default=256)
    words.add_argument("--fused-tokens", type=int, default=1024)
    words.add_argument("--hidden", type=int, default=256)
    words.add_argument("--vocab", type=int, default=131072)
    words.add_argument("--chunk-tokens", type=lambda v: v if v == AUTO else int(v), default=AUTO)
    words.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    return words


def main() -> int:
    args = start(flags())
    if args.quick:
        args.tokens, args.fused_tokens, args.vocab, args.tp = 64, 64, 16384, [1]
    settings = {name: getattr(args, name) for name in SETTINGS}
    cases = [case(args, tp) for tp in args.tp]
    met = all(c[name] <= goal for c in cases for name, goal in GOALS.items())
    return finish(args, {"met": met, "goals": GOALS, "settings": settings, "cases": cases})


if __name__ == "__main__":
    raise SystemExit(main())
