"""Megatron's checkpoint writer without a process that a signal can take away from it.

Stock Megatron (`dist_checkpointing/strategies/filesystem_async.py`, the same in 0.15 and 0.16) hands results over by a
queue in a manager process that lives from the first save to the end of the run, and writes in processes that are forked
for each save. A SIGTERM to the whole process group, as launchers send it, ends the manager, and the save that should
follow breaks; one that ends a writer leaves the save waiting for ever; and after a `kill -9` both kinds stay behind.

Saves here are synchronous (`ckpt_async_save=False`): who puts the results and who takes them is one process. So the
queue is a plain one, and there is no manager. Writers leave signals to the process that forked them, and end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
from typing import Any

from nemo_elastic.mcore.versions import checkpoint_writing
from nemo_elastic.processes.orphans import end_with_parent

LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_results: queue.SimpleQueue = queue.SimpleQueue()


def install() -> None:
    """Change the writer in place; idempotent. To be called before the first save."""
    writing = checkpoint_writing()
    writer = writing.FileSystemWriterAsync
    if getattr(writer.write_preloaded_data, "outlives_signals", False):
        return
    writing._get_write_results_queue = lambda: _results
    writer.write_preloaded_data = staticmethod(outliving_signals(writer.write_preloaded_data))


def outliving_signals(write: Callable[..., Any]) -> Callable[..., Any]:
    """`write` as the work of a forked process that ignores signals and dies with the process that forked it."""

    def write_alone(*arguments: Any, **keywords: Any) -> Any:
        parent = multiprocessing.parent_process()
        assert parent is not None and os.getpid() != parent.pid, "a writer is a process of its own"
        for number in LEFT_TO_THE_PARENT:
            signal.signal(number, signal.SIG_IGN)
        end_with_parent(parent.pid)
        return write(*arguments, **keywords)

    write_alone.outlives_signals = True
    return write_alone
