"""`--nproc N`: N processes of the same command on this machine, with torchrun's variables and our own exit codes.

torchrun itself answers every worker that ends with another code than 0 with a traceback of its own and exit code 1, and
kills after 30 seconds whoever still saves a checkpoint. Here the workers' own message is the last word:

    all end with 0                      0
    a worker ends with another code     that code, once the others have ended too (told to after GRACE seconds)
    a worker is killed by signal n      128 + n, and a line that says so
    SIGTERM, SIGINT, SIGUSR1 to it      passed on to every worker; it waits for as long as they need

Several machines are torchrun's business (docs/cli.md). Workers end when the launcher is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from ..processes.orphans import end_with_parent
from ..processes.started import VARIABLE, started

GRACE = 15.0  # seconds that the others have for a message of their own; then they are told to end
PATIENCE = 60.0  # seconds from there until what still runs is killed
LAUNCHER = "NEMO_ELASTIC_LAUNCHER"  # its process id, in the workers' environment
STOPPED = (143, -signal.SIGTERM)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` in `count` processes; the exit code of the whole."""
    from torch.distributed import TCPStore

    # The workers meet at a store that is open before the first of them starts: no port is free now and taken then.
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    shared = {
        LAUNCHER: str(os.getpid()), VARIABLE: str(started()),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0",
    }  # fmt: skip
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    workers: list[subprocess.Popen] = []

    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    # What this process was told to ignore (SIGHUP under nohup, SIGINT of a script's `&`) its workers ignore, too.
    heard = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank)}
            workers.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, start_new_session=True))
        return _wait(workers)
    finally:
        _kill(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen]) -> int:
    """Until all have ended. The first that failed decides the code; having been asked to stop is no failure."""
    running, failed = dict(enumerate(workers)), []
    since, told = 0.0, False
    while running:
        for rank in [rank for rank, worker in running.items() if worker.poll() is not None]:
            if code := running.pop(rank).returncode:
                since = since if failed else time.monotonic()
                failed.append((code in STOPPED, len(failed), rank, code))
        waited = time.monotonic() - since if failed else 0.0
        if waited > GRACE and not told:
            told = True
            for worker in running.values():
                worker.terminate()
        if waited > GRACE + PATIENCE and not min(failed)[0]:
            _kill(list(running.values()))
        time.sleep(0.05)
    *_, rank, code = min(failed, default=(False, 0, 0, 0))
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; was it out of memory?" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"nemo-elastic: worker {rank} of {len(workers)} was ended by {name}{hint}\n")
    return 128 - code


def _kill(workers: Sequence[subprocess.Popen]) -> None:
    """What still runs, with the processes it started."""
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def end_with_launcher() -> None:
    """In a worker: let it end when the launcher is killed."""
    launcher = os.environ.pop(LAUNCHER, None)  # not for the processes that this one starts
    if launcher is not None:
        end_with_parent(int(launcher))
