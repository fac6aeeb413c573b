"""What every benchmark shares: its flags, the statement of its machine, taking turns, and the JSON that it leaves.

    parser(doc, ...) -> start(parser) -> interleaved(runs, repetitions) -> finish(arguments, result)

Runs that are compared take turns within one process (or one script), so that what else the machine does meets them all.
With `--device cuda` (benchmarks that have the flag) times are taken by events on the GPU's stream.
A result begins with `benchmark`, `quick`, `machine` and, where there are any, `repetitions`. It goes to standard output
and, with `--output`, to a file. The exit code is 1 where a full run misses a limit (`met` is false), and 0 otherwise.
Importing this module puts the repository in front of the path: benchmarks measure the tree that they stand in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_elastic.files import write_json

ROOT = Path(__file__).resolve().parents[1]


class Seconds(NamedTuple):
    """What a run took."""

    wall: float
    cpu: float


def parser(
    doc: str | None, *, quick: str, repetitions: int | None = None, threads: int | None = 1, device: bool = False
) -> argparse.ArgumentParser:
    """The flags that benchmarks have in common.

    Args:
        doc: the script's docstring.
        quick: what `--quick` does.
        repetitions: default of `--repetitions`, 1 with `--quick`; None where repeating has another name.
        threads: default of `--threads`; None where processes are measured that choose for themselves.
        device: whether it can run on a GPU: adds `--device`.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help=quick)
    if repetitions is not None:
        found.add_argument("--repetitions", type=int, help=f"default {repetitions}; 1 with --quick")
    if threads is not None:
        found.add_argument("--threads", type=int, default=threads)
    if device:
        found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--output", type=Path, help="write the JSON here as well")
    found.set_defaults(full_repetitions=repetitions)
    return found


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a flag whose value is a comma separated list."""

    def several(text: str) -> list[Any]:
        try:
            return [of(word) for word in text.split(",")]
        except ValueError:
            message = f"{text!r} must be a comma separated list, each of it {of.__name__}"
            raise argparse.ArgumentTypeError(message) from None

    return several


def start(words: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, set threads and note the machine, before anything has run."""
    arguments = words.parse_args()
    repeats, threads = arguments.full_repetitions, getattr(arguments, "threads", None)
    if repeats is not None and arguments.repetitions is None:
        arguments.repetitions = 1 if arguments.quick else repeats
    for name in ("repetitions", "threads"):
        if (value := getattr(arguments, name, None)) is not None and value < 1:
            words.error(f"--{name} {value} must be at least 1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that this one starts
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    arguments.machine, arguments.started = machine(threads), time.monotonic()
    if getattr(arguments, "device", "cpu") == "cuda":
        import torch

        if not torch.cuda.is_available():
            words.error("--device cuda: torch sees no GPU here")
        arguments.machine["gpu"] = torch.cuda.get_device_name()
    return arguments


def machine(threads: int | None = None) -> dict[str, Any]:
    """What figures were taken on. `threads`: None for what a process of its own would take."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "torch": torch,
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def finish(arguments: argparse.Namespace, result: Mapping[str, Any]) -> int:
    """Print the result, write it to `--output`; the exit code."""
    head = {"benchmark": Path(sys.argv[0]).stem, "quick": arguments.quick, "machine": arguments.machine}
    if arguments.full_repetitions is not None:
        head["repetitions"] = arguments.repetitions
    whole = {**head, "seconds": round(time.monotonic() - arguments.started, 1), **result}
    print(json.dumps(whole, indent=2))
    if arguments.output:
        write_json(arguments.output, whole)
    return int(not arguments.quick and whole.get("met") is False)


def timed(act: Callable[[], object]) -> Seconds:
    """One call, by the clock and in CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def timer(device: Any) -> Callable[[Callable[[], object]], Seconds]:
    """What times a call on a `torch.device`: `timed` on a CPU; on a GPU the seconds between two events on its stream,
    given as both (what the CPU does meanwhile is no part of them)."""
    if device.type != "cuda":
        return timed
    import torch

    def events(act: Callable[[], object]) -> Seconds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        act()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        return Seconds(seconds, seconds)

    return events


def process(command: Sequence[str], **how: Any) -> Seconds:
    """One process from start to end, its own children's CPU seconds included.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    begin = time.perf_counter()
    running = subprocess.Popen(command, **how)
    _, status, usage = os.wait4(running.pid, 0)
    wall = time.perf_counter() - begin
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    return Seconds(wall, usage.ru_utime + usage.ru_stime)


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    warm_up: bool = True,
    before: Callable[[str], object] = lambda name: None,
    measure: Callable[[Callable[[], object]], Any] = timed,
) -> dict[str, list[Any]]:
    """Every run once a repetition, in turn; name -> what `measure` (by default `timed`) says of each.

    Args:
        warm_up: a first round that does not count.
        before: called with the name in front of each run, untimed.
    """
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for repetition in range(repetitions + warm_up):
        for name, run in runs.items():
            before(name)
            taken = measure(run)
            if repetition >= warm_up:
                found[name].append(taken)
    return found


def median(found: Sequence[Seconds]) -> Seconds:
    """Wall and CPU seconds, each by itself."""
    return Seconds(*map(statistics.median, zip(*found, strict=True)))


def least(found: Sequence[Seconds]) -> Seconds:
    """Wall and CPU seconds, each by itself."""
    return Seconds(*map(min, zip(*found, strict=True)))


def memory_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (the most since `forget_peak`) of this process."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def forget_peak() -> None:
    """The high-water mark of the resident set starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def values(result: Any, path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names on the way, value) at a dotted path; `*` is every element of a list or value of a dict.

    Raises:
        KeyError: the path leads nowhere.
    """
    here, _, rest = path.partition(".")
    if here == "*":
        items = result.items() if isinstance(result, Mapping) else enumerate(result)
    elif isinstance(result, Mapping) and here in result:
        items = [(here, result[here])]
    else:
        raise KeyError(path)
    for name, value in items:
        below = values(value, rest) if rest else [((), value)]
        yield from (((str(name), *names), found) for names, found in below)
