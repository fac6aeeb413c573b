"""One run at a time in a run folder: `OUT/.lock`, held while somebody writes there.

The lock is POSIX's (fcntl), because it is the one that holds where run folders lie: the kernel gives it up when its
process ends however that ends, NFS carries it between hosts (v4 itself, v3 by lockd, and flock is made of it there),
and a server drops it when a client is gone for its lease. A file that merely exists, or says a process id, would
outlive a dead run or mean nothing on another host. Children that a run forks do not inherit it, so a helper that hangs
keeps nothing. What is written in the file is only for the message, and the file goes with the lock: after it is taken,
its name must still be that of the file that was opened, else another one is opened.

Where a file system has no locks (Lustre mounted without `flock`), a warning says that nothing watches over the folder.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..problems import Problem, ProblemsError, raise_if_any

logger = logging.getLogger(__name__)
FILE = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_mine: set[Path] = set()  # what this process holds: opening such a file again and closing it would give the lock up


def lock_problems(out: Path) -> list[Problem]:
    """Who else writes in `out` now; nothing is taken or made."""
    path = (out / FILE).absolute()
    if path in _mine or not path.is_file():
        return []
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return []  # not ours to write in; another check says so
    try:
        return _take(file, out, fcntl.LOCK_SH)  # ranks of one run that look at the same time are in nobody's way
    finally:
        os.close(file)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out` for a block. The folder is made, and goes again where nothing is in it at the end.

    Raises:
        ProblemsError: another process has it; host and process are named.
    """
    path = (out / FILE).absolute()
    if path in _mine:  # a verb that calls another
        yield
        return
    made = _make(out)
    file = -1
    try:
        file = _open_and_take(path, out)
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)
        _mine.add(path)
        yield
    finally:
        if path in _mine:
            _mine.discard(path)
            path.unlink(missing_ok=True)  # while the lock is held: who opened it before finds that it is gone
        if file >= 0:
            os.close(file)
        for folder in made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _make(out: Path) -> list[Path]:
    """Make `out`; the folders that were not there, innermost first."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    return made


def _open_and_take(path: Path, out: Path) -> int:
    """The open file of a lock that was taken and still has its name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            raise_if_any(_take(file, out))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _take(file: int, out: Path, kind: int = fcntl.LOCK_EX) -> list[Problem]:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NONE:
            logger.warning("%s: its file system has no locks; never start two runs into it", out)
            return []
        if error.errno not in HELD:
            raise ProblemsError([Problem("--out", f"{out} cannot be locked ({error.strerror})")]) from error
        return [Problem("--out", f"{out} is being written by {_holder(file)}; wait for it, or choose another --out")]
    return []


def _holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"process {about['process']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
