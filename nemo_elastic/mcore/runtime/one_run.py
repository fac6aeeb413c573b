"""The lock of a run folder for all processes of a run: the first rank takes it, every rank learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...processes.runlock import locked
from . import process_groups


@contextmanager
def one_run(out: Path) -> Iterator[None]:
    """Nobody else writes in `out` during the block.

    Raises:
        ProblemsError: another process does; the same on every rank.
    """
    with ExitStack() as held:
        process_groups.on_first_rank(lambda: held.enter_context(locked(out)))
        yield
