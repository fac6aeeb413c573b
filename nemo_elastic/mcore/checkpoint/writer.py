"""Megatron's checkpoint writer without a process that a signal can take away from it.

Stock Megatron (`dist_checkpointing/strategies/filesystem_async.py`, the same in 0.15 and 0.16) hands results over by a
queue in a manager process that lives from the first save to the end of the run, and writes in processes that are forked
for each save. A SIGTERM to the whole process group, as launchers send it, ends the manager, and the save that should
follow breaks; one that ends a writer leaves the save waiting for ever; and after a `kill -9` both kinds stay behind.

Here the results of a save come by a file of its own, without a name: no manager, and no pipe that can fill up while
nobody reads. In a synchronous save the run itself puts and takes them. In an asynchronous one Megatron forks a process
that forks the writers and puts the results, and the run takes them when that process has ended. All of these leave
signals to the run, and end with the process that forked them.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Callable
from typing import IO, Any

from nemo_elastic.mcore.versions import checkpoint_writing
from nemo_elastic.processes.orphans import end_with_parent

LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SIZE = 8  # bytes that say how many follow


class Results:
    """What one save's writers found, put by the process that forked them and taken by the one that made this."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._file = _unnamed_file()  # forked processes share it

    def put(self, results: Any) -> None:
        """Once, as a whole."""
        data = pickle.dumps(results)
        self._file.seek(0)
        self._file.write(len(data).to_bytes(SIZE, "big") + data)
        self._file.flush()

    def get_nowait(self) -> Any:
        """What was put.

        Raises:
            queue.Empty: nothing, or not all of it: the process died. Megatron then fails the save on every rank.
        """
        self._file.seek(0)
        data = self._file.read()
        if len(data) < SIZE or len(data) - SIZE != int.from_bytes(data[:SIZE], "big"):
            raise queue.Empty
        return pickle.loads(data[SIZE:])


def install() -> None:
    """Change the writer in place; idempotent. To be called before the first save."""
    writing = checkpoint_writing()
    writer = writing.FileSystemWriterAsync
    if getattr(writer.write_preloaded_data, "outlives_signals", False):
        return
    writing._get_write_results_queue = Results
    writer.write_preloaded_data = staticmethod(outliving_signals(writer.write_preloaded_data))
    writer.write_preloaded_data_multiproc = staticmethod(beside_the_run(writer.write_preloaded_data_multiproc))


def outliving_signals(write: Callable[..., Any]) -> Callable[..., Any]:
    """`write` as the work of a forked process that ignores signals and dies with the process that forked it."""

    def write_alone(*arguments: Any, **keywords: Any) -> Any:
        parent = multiprocessing.parent_process()
        assert parent is not None and os.getpid() != parent.pid, "a writer is a process of its own"
        _belong_to(parent.pid)
        return write(*arguments, **keywords)

    write_alone.outlives_signals = True
    return write_alone


def beside_the_run(write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, whose last argument are the `Results`: in the run itself, or in a process that was forked for it."""

    def write_all(*arguments: Any, **keywords: Any) -> Any:
        results: Results = arguments[-1]
        if os.getpid() != results.owner:
            _belong_to(results.owner)
        return write(*arguments, **keywords)

    return write_all


def _belong_to(parent: int) -> None:
    for number in LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)


def _unnamed_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):  # Linux; a full disk does not matter to it
        return os.fdopen(os.memfd_create("checkpoint_results"), "w+b")
    return tempfile.TemporaryFile()
