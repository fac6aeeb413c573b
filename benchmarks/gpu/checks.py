"""Run checks by name or stage; a JSON line for each on standard output, as soon as it is done.

    python benchmarks/gpu/checks.py scan_torch kd_fused --device cpu --tiny
    python benchmarks/gpu/checks.py --stage 1 --device cuda [--kernels only|without]

A check that raises or outlives its own limit gets a line that says so, and the next one runs. What libraries print goes
to standard error. Which kernels are there is a matter of the path (see run.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import registry


class TimeLimit(BaseException):
    """A check's own limit has passed; not to be caught by what catches every `Exception`."""


def report(check: registry.Check, machine: registry.Machine) -> dict[str, Any]:
    """The line of one check: what it found, or why it failed."""

    def stop(number: int, frame: object) -> None:
        raise TimeLimit

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    line: dict[str, Any] = {"check": check.name, "stage": check.stage, "ok": False}
    limit = check.seconds * (1 if machine.is_cuda else registry.CPU_PATIENCE)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        found = check.run(machine)
        line |= {"ok": True, "stand_in": found.stand_in, "values": dict(found.values)}
    except TimeLimit:
        line["error"] = f"cut after its {limit:g} s"
    except Exception as error:
        traceback.print_exc()
        line["error"] = f"{type(error).__name__}: {error}"[-2000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return line | {"seconds": round(time.monotonic() - began, 2)}


def chosen(checks: dict[str, registry.Check], arguments: argparse.Namespace) -> list[registry.Check]:
    """Those that were asked for, in their own order.

    Raises:
        SystemExit: a name that is none.
    """
    if unknown := [name for name in arguments.names if name not in checks]:
        raise SystemExit(f"no check {', '.join(unknown)}; there are {', '.join(checks)}")
    found = [c for c in checks.values() if c.name in arguments.names or c.stage == arguments.stage]
    wanted = {"all": (True, False), "only": (True,), "without": (False,)}[arguments.kernels]
    return [c for c in found if c.needs_kernels in wanted]


def main(words: Sequence[str] | None = None) -> int:
    """1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--stage", type=int, help="every check of a stage")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to rehearse: takes seconds on a CPU")
    parser.add_argument("--kernels", choices=("all", "only", "without"), default="all", help="checks that need them")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the stage*.py files are")
    arguments = parser.parse_args(words)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, from C too, is no line of ours
    registry.paths_of_the_tree()
    machine, failed = registry.Machine(arguments.device, arguments.tiny), False
    if arguments.tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if machine.is_cuda:
        import torch

        torch.cuda.set_device(machine.device)
        torch.backends.cudnn.allow_tf32 = False
    for check in chosen(registry.all_checks(arguments.folder), arguments):
        line = report(check, machine)
        failed |= not line["ok"]
        print(json.dumps(line), file=out, flush=True)
        if machine.is_cuda:
            sys.modules["torch"].cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
