"""How long this command has been running, on the machine's own clock.

With `--nproc` the command began with the launcher, which says when; torchrun's workers count from their own start.
"""

import os
import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # what the kernel counts starts of processes by
VARIABLE = "NEMO_ELASTIC_STARTED"  # seconds of the clock that processes of a machine share


def _own_start() -> float:
    """When this process was started (Linux), else now: its own first moment in here."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.clock_gettime(_CLOCK)


_START = _own_start()


def started() -> float:
    """The start of the command, for the environment of its workers."""
    return float(os.environ.get(VARIABLE, _START))


def seconds_running() -> float:
    """Seconds since the command was started."""
    return time.clock_gettime(_CLOCK) - started()
