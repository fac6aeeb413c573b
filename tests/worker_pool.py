"""N persistent processes that run functions of tests under any Megatron layout, over gloo.

    pool.run(function, x, tp=2, pp=2, sp=True) == [function(x, sp=True) on rank 0, on rank 1, ...]

Megatron is imported once per process. Between cases the parallel state is made anew when the layout changed, and the
random tracker is reseeded always. A case that raises on any rank fails the test with that rank's traceback; a case
that hangs is killed after `timeout` seconds (the start does not count). In both cases the processes are replaced: a
rank that failed may have left the others in the middle of a collective.

Between uses the processes are stopped (SIGSTOP): gloo's threads poll, and would take a fifth of the machine from the
tests that follow. A stopped process hears SIGKILL and nothing else, so it is ended by that alone: by `kill`, at the
exit of the process that started it (before multiprocessing's own end, which terminates and then waits), and by the
kernel where that process was killed. Each leads a session of its own: a stopped process makes the kernel hang up on its
whole process group when that group's shell ends, and Ctrl-C is for the one that is at work.

`function` must be importable (module level of a test file or of a `pool_*.py` file); results travel by pickle.
"""

import atexit
import importlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

SEED = 1234
START_TIMEOUT = 300.0  # of importing Megatron, on a machine that is busy


class RankFailed(AssertionError):
    """A function raised on a rank of the pool, or did not come back."""


def open_store() -> tuple[Any, dict[str, str]]:
    """A store that is open before those who meet there start (a port that is free now may be taken then).

    Returns:
        The store, to be kept as long as they meet there, and the environment in which they find it.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    found = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return store, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)} | found


def _serve(
    connection: Connection, rank: int, world: int, meeting: dict[str, str], path: Sequence[str], parent: int
) -> None:
    """A worker: sets itself up once, then answers (module, name, layout, arguments) until told to stop."""
    os.setsid()
    os.environ.update(meeting, RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    sys.path[:] = path
    from nemo_elastic.processes.orphans import end_with_parent

    end_with_parent(parent)
    import torch
    import torch.distributed as dist

    from nemo_elastic.mcore.runtime import cpu

    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group("gloo", rank=rank, world_size=world)
    layout = None
    connection.send((True, pickle.dumps(rank)))
    while (message := connection.recv()) is not None:
        module, name, wanted, payload = message
        try:
            layout = _set_layout(layout, wanted)
            arguments, keywords = pickle.loads(payload)
            result = getattr(importlib.import_module(module), name)(*arguments, **keywords)
            connection.send((True, pickle.dumps(result)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def _set_layout(current: dict[str, int] | None, wanted: dict[str, int]) -> dict[str, int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_elastic.mcore.runtime.process_groups import forget_layout

    if current != wanted:
        if current is not None:
            forget_layout()
        parallel_state.initialize_model_parallel(**wanted)
    model_parallel_cuda_manual_seed(SEED)
    return wanted


class WorkerPool:
    """`size` processes; see the module's docstring. Processes start at the first `run`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._store: Any = None

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        timeout: float = 120.0,
        **keywords: Any,
    ) -> list[Any]:
        """The results of `function(*arguments, **keywords)` on every rank under TP x PP x CP.

        What remains is data parallel. `ep` of the data- and context-parallel ranks share out a layer's experts.

        Sequence parallelism is a matter of the model's config: it is passed on, as a keyword, to the function.

        Raises:
            RankFailed: with rank and traceback of the first rank that failed, or the ranks that did not answer, or that
                have died since the last use.
        """
        if self.size % (tp * pp * cp):
            raise ValueError(f"tp={tp} x pp={pp} x cp={cp} does not divide the pool's {self.size} processes")
        layout = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "expert_model_parallel_size": ep,
        }
        message = (function.__module__, function.__qualname__, layout, pickle.dumps((arguments, keywords)))
        try:
            if not self._workers:
                self._start()
                self._collect(START_TIMEOUT)
            self._signal(signal.SIGCONT)
            for rank, (_, connection) in enumerate(self._workers):
                try:
                    connection.send(message)
                except ConnectionError as error:
                    raise RankFailed(f"rank {rank} died") from error
            results = self._collect(timeout)
            self._signal(signal.SIGSTOP)
            return results
        except BaseException:
            self.kill()
            raise

    def _collect(self, timeout: float) -> list[Any]:
        deadline = monotonic() + timeout
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        results: list[Any] = [None] * self.size
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - monotonic()))
            if not ready:
                raise RankFailed(f"no answer within {timeout} s from ranks {sorted(waiting.values())}")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    done, result = connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise RankFailed(f"rank {rank} died") from error
                if not done:
                    raise RankFailed(f"rank {rank} of {self.size}:\n{result}")
                results[rank] = pickle.loads(result)
        return results

    def _signal(self, number: signal.Signals) -> None:
        for rank, (process, _) in enumerate(self._workers):
            if not process.is_alive():  # its number may be another process's by now
                raise RankFailed(f"rank {rank} died")
            os.kill(process.pid, number)

    def _start(self) -> None:
        atexit.register(self.kill)
        context = get_context("spawn")
        self._store, meeting = open_store()
        path = [str(Path(__file__).parent), *sys.path]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, meeting, path, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def kill(self) -> None:
        """End the processes at once; the next `run` starts new ones."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()
        self._store = None
        atexit.unregister(self.kill)


def open_pool(size: int) -> Iterator[WorkerPool]:
    """For fixtures: a pool whose processes are ended afterwards."""
    pool = WorkerPool(size)
    yield pool
    pool.kill()
