"""What is random in an elastic run, each a pure function of (seed, step, global micro-batch index).

The global index of a micro-batch is `micro_batch * DP + dp_rank`, so data parallelism changes nothing, and every
tensor- and pipeline-parallel rank of a replica draws the same. No global generator is read or seeded: dropout and data
order stay as they were (METHOD section 8, trap 9).
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST_UNIFORM = 2.0**-25  # keeps -log(-log(u)) finite in fp32


def counter_bits(purpose: str, seed: int, step: int, global_micro_batch: int) -> int:
    """64 bits for one purpose at one point of the run, independent between any two of them."""
    words = f"{purpose}|{seed}|{step}|{global_micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def sample_budgets(
    probabilities: Mapping[str, float], seed: int, step: int, global_micro_batch: int, count: int = 1
) -> dict[str, float]:
    """The budgets of one micro-batch and their shares of its loss, which sum to 1.

    Systematic sampling: `count` points one `count`-th apart, from one random start, in the stacked `probabilities`
    (any positive scale). A budget's expected share is its probability whatever `count` is; with as many points as
    equally likely budgets, every micro-batch has each of them once.
    """
    total = sum(probabilities.values())
    if not total > 0 or any(p < 0 for p in probabilities.values()):
        raise ValueError(f"budget_probabilities must be non-negative and not all zero, got {dict(probabilities)}")
    start = counter_bits("budget", seed, step, global_micro_batch) / 2**64
    shares: dict[str, float] = {}
    for point in ((start + i) / count * total for i in range(count)):
        name = _at(probabilities, point)
        shares[name] = shares.get(name, 0.0) + 1 / count
    return shares


def _at(probabilities: Mapping[str, float], point: float) -> str:
    chosen, reached = "", 0.0
    for name, p in probabilities.items():
        if p > 0:
            chosen, reached = name, reached + p
            if point < reached:
                break
    return chosen


def gumbel_noise(
    shapes: Mapping[str, tuple[int, int]], seed: int, step: int, global_micro_batch: int, student: int = 0
) -> dict[str, Tensor]:
    """Standard Gumbel noise `[rows, choices]` per dim, fp32 on the CPU. A dim's noise does not depend on other dims.

    Args:
        student: which of the micro-batch's students.
    """
    noise = {}
    for name, shape in shapes.items():
        bits = counter_bits(f"gumbel {name}" + f" {student}" * bool(student), seed, step, global_micro_batch)
        generator = torch.Generator().manual_seed(bits % 2**63)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float32).clamp_(SMALLEST_UNIFORM, 1 - 2.0**-24)
        noise[name] = -torch.log(-torch.log(uniform))
    return noise
