"""What goes to a person's terminal: the answer on stdout, problems, progress and logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..problems import ProblemsError

NOISY = (
    "megatron",
    "lightning",
    "lightning.pytorch",
    "nemo",
    "NeMo",
    "torch",
    "transformers",
    "nv_one_logger",
    "modelopt",
)


class Stdout:
    """Keeps the real stdout for the verb's answer; meanwhile file descriptor 1 (what libraries print) is stderr."""

    def __enter__(self) -> Stdout:
        sys.stdout.flush()
        try:
            self._saved = os.dup(1)
            os.dup2(2, 1)
        except OSError:  # no descriptors (a captured stdout)
            self._saved = None
        sys.stderr = _Heard(sys.stderr)
        self._shown, sys.stdout = sys.stdout, sys.stderr
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
        if isinstance(sys.stderr, _Heard):
            sys.stderr = sys.stderr.stream

    def release(self) -> None:
        """Give stdout back; a program that replaces this one inherits the real one."""
        sys.stdout = self._shown
        if self._saved is not None:
            sys.stderr.flush()
            os.dup2(self._saved, 1)
            os.close(self._saved)
            self._saved = None

    def write(self, text: str, *, end: str = "\n") -> None:
        """Print to the real stdout, from the first rank only."""
        if not is_first_rank():
            return
        with suppress(BrokenPipeError):  # nobody reads any more (`| head`): what was done is done
            if self._saved is None or not _is_real(self._shown):
                self._shown.write(text + end)
                self._shown.flush()
                return
            rest = (text + end).encode()
            while rest:
                rest = rest[os.write(self._saved, rest) :]

    def json(self, value: Any) -> None:
        """Print JSON."""
        self.write(json.dumps(value, indent=2))

    def render(self, *parts: Any) -> None:
        """Print rich renderables, with colour on a terminal only."""
        from rich.console import Console

        colour = self._saved is not None and os.isatty(self._saved)
        width = None if colour else 150
        console = Console(force_terminal=colour, width=width, record=False, file=_Null())
        with console.capture() as captured:
            for part in parts:
                console.print(part)
        self.write(captured.get().rstrip("\n"))


class _Heard:
    """A stream that swallows what nobody reads any more: a closed pipe must not end a run of days."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """All of `text`, or nothing at all once the pipe is closed."""
        with suppress(BrokenPipeError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """What is buffered, if it can be."""
        with suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Null:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def _is_real(stream: Any) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False


def is_first_rank() -> bool:
    """Whether this process speaks for the run under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def show_problems(error: ValueError, verb: str, *, everywhere: bool = False) -> None:
    """One clear message on stderr from each machine, as a folder may be missing on one of several.

    The first process of a machine speaks (or, where nobody knows which that is, `everywhere`).
    """
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if not (everywhere or first):
        return
    if isinstance(error, ProblemsError):
        many = f"{len(error.problems)} problems" if len(error.problems) > 1 else "a problem"
        sys.stderr.write(f"nemo-elastic {verb}: {many} to mend\n")
        for problem in error.problems:
            sys.stderr.write(f"  {' '.join(str(problem).split())}\n")  # one line, whatever the user's words hold
    else:
        sys.stderr.write(f"nemo-elastic {verb}: {error}\n")


def quiet_libraries(verbose: bool) -> None:
    """Let through only warnings that a user can act on; `--verbose` shows everything."""
    import warnings

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "OFF")
    level = logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if verbose:
        return
    warnings.filterwarnings("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(level)
    # NeMo sets this one's level itself when it is imported, and then warns of modules of its own
    logging.getLogger("nemo_logger").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Any]:
    """A rich progress display with ETA on stderr; on anything but a terminal, a line now and then."""
    if not (enabled and is_first_rank()):
        yield Lines(silent=True)
        return
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield Bars(shown)


class Bars:
    """Named bars on a terminal."""

    def __init__(self, shown: Any) -> None:
        self.shown, self.tasks = shown, {}

    def update(self, name: str, done: int, total: int, text: str = "") -> None:
        """Set a bar; made at first use."""
        if name not in self.tasks:
            self.tasks[name] = self.shown.add_task(name, total=total, text=text)
        self.shown.update(self.tasks[name], completed=done, total=total, text=text)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.shown.console.print(text)


class Lines:
    """The same without a terminal: a line at every tenth of the way."""

    def __init__(self, silent: bool = False) -> None:
        self.silent, self.tenths = silent, {}

    def update(self, name: str, done: int, total: int, text: str = "") -> None:
        """A line when another tenth is done."""
        tenth = 10 * done // max(1, total)
        if not self.silent and self.tenths.get(name) != tenth:
            self.tenths[name] = tenth
            sys.stderr.write(f"{name}: {done}/{total}  {text}\n")
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line."""
        if not self.silent:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
