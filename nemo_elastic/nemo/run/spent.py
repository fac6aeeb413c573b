"""What a run spends: wall time by what it goes into, and memory.

A lap is a step: from the end of the one before to its own, without validations and without what saving kept it waiting
(of an asynchronous save, only until the run goes on). A save begins when Lightning collects the checkpoint, which is
after the lap that it belongs to, and ends when the next step begins.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

Clocks = tuple[float, float]  # wall clock, and this process' time on all its cores, in seconds


def clocks() -> Clocks:
    """Now."""
    return time.monotonic(), time.process_time()


class Times:
    """The clock of a training loop."""

    def __init__(self) -> None:
        self.began, self._saving = clocks(), None

    def lap(self) -> Clocks:
        """(wall, CPU) seconds since the last lap, which this begins anew."""
        before, self.began = self.began, clocks()
        return self.began[0] - before[0], self.began[1] - before[1]

    def begin_save(self) -> None:
        """A checkpoint is being collected."""
        self._saving = self._saving or clocks()

    def end_save(self) -> float | None:
        """Seconds that saving took, which the lap under way has not; None where nothing was saved."""
        if self._saving is None:
            return None
        spent = [now - then for now, then in zip(clocks(), self._saving, strict=True)]
        self.began, self._saving = (self.began[0] + spent[0], self.began[1] + spent[1]), None
        return spent[0]


def peak_memory(device: torch.device) -> float:
    """Bytes of the process that had most so far: what was allocated on its GPU, or resident without one. Collective."""
    if device.type == "cuda":
        most = float(torch.cuda.max_memory_allocated(device))
    else:
        most = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    found = torch.tensor(most, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return float(found)
