"""What a check is: a function of a `Machine`, with its stage, its time limit and what was predicted before it ever ran.

    @check(stage=5, seconds=60, predicted={"sliced_over_extracted": (None, 1.05)})
    def step_time(machine: Machine) -> Found: ...

A prediction is a range of one of the values that the check reports; None leaves a side open. A check that finds a
wrong number raises; one that is slower than predicted reports what it found, and `docs/gpu.md` says so.
`stand_in`: a twin in plain torch ran in the place of the kernel that the check is about. Such a line is no result.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    0: ("facts, imports, ceilings of copy and product", 60),
    1: ("kernels alone, against fp64 on the CPU", 60),
    2: ("masked, sliced and extracted are equal; no wait for the device", 90),
    3: ("the pipeline cut to 12 steps, saved and resumed", 120),
    4: ("two processes on the device: TP 2 is TP 1", 60),
    5: ("time of a step at 12B widths", 90),
    6: ("output layer and distillation loss", 60),
    7: ("serving: switch, prefill, decode", 75),
    8: ("Transformer Engine", 90),
    9: ("phases, compiled and eager, where a step's time goes", 60),
}
CPU_PATIENCE = 5  # limits are of a GPU; a rehearsal may have a busy laptop
Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Found:
    """Values of a check, by name; numbers, words, or lists of them."""

    values: Mapping[str, Any]
    stand_in: bool = False


@dataclass(frozen=True)
class Machine:
    """Where a check runs, `kind` cpu or cuda, and whether with toy sizes (to rehearse it)."""

    kind: str = "cpu"
    tiny: bool = False

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.kind, 0) if self.is_cuda else torch.device(self.kind)

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def milliseconds(self, act: Callable[[], object], repetitions: int = 5) -> float:
        """Median of some calls behind one that warms up; on a GPU by events on its stream."""
        from harness import timer

        measure = timer(self.device)
        act()
        return 1e3 * statistics.median(measure(act).wall for _ in range(1 if self.tiny else repetitions))

    def peak_bytes(self, act: Callable[[], object]) -> int:
        """What a call adds at most to the memory in use; 0 on a CPU, where nobody counts."""
        import torch

        if not self.is_cuda:
            act()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Check:
    """See the module. `needs_kernels`: it is about compiled kernels, which must be on the path."""

    name: str
    about: str
    stage: int
    seconds: float
    run: Callable[[Machine], Found]
    needs_kernels: bool = False
    predicted: Mapping[str, Range] = field(default_factory=dict)


CHECKS: dict[str, Check] = {}


def check(
    *, stage: int, seconds: float, predicted: Mapping[str, Range] | None = None, needs_kernels: bool = False
) -> Callable[[Callable[[Machine], Found]], Callable[[Machine], Found]]:
    """Register a check under its function's name; the first line of its docstring says what it is about."""

    def register(function: Callable[[Machine], Found]) -> Callable[[Machine], Found]:
        name = function.__name__
        about = (function.__doc__ or name).strip().splitlines()[0].rstrip(".")
        CHECKS[name] = Check(name, about, stage, seconds, function, needs_kernels, dict(predicted or {}))
        return function

    return register


def all_checks(folder: Path = Path(__file__).parent) -> dict[str, Check]:
    """Every check of a folder's `stage*.py`, by name, in the order of the stages."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for file in sorted(folder.glob("stage*.py")):
        importlib.import_module(file.stem)
    return CHECKS


def paths_of_the_tree() -> None:
    """The repository, its benchmarks and its tests' helpers on the path, ahead of what is installed."""
    for folder in (ROOT / "tests", ROOT / "benchmarks", Path(__file__).parent, ROOT):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def one_process() -> None:
    """Megatron's state for this process alone, once; by gloo where there is no GPU."""
    import torch.distributed as dist
    from elastic_step import start_megatron

    if not dist.is_initialized():
        start_megatron()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 difference, in fp64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
