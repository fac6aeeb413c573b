"""Files of a checkpoint folder, each opened once: what was checked is what is read.

Every file is opened when the folder is, and read through that handle ever after: a file that somebody puts in its place
is never looked at. (A file that is rewritten in place keeps its handle; `HeldCheckpoint` copies the small ones.)
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path

from ..problems import Problem, ProblemsError


class HeldFolder:
    """Open handles of files of a folder, by name.

    Args:
        names: files that must be there.

    Raises:
        ProblemsError: a file is missing or cannot be opened.
    """

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        self._finalizer = weakref.finalize(self, _close, self._files)
        for name in names:
            self.open(name)

    def open(self, name: str) -> int:
        """The handle of a file, opened at the first call.

        Raises:
            ProblemsError: it is missing or cannot be opened.
        """
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = _open(path)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise self._problem(name, "is missing: not a whole checkpoint; copy it again") from error
            except OSError as error:
                raise self._problem(name, f"cannot be opened ({error.strerror})") from error
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return os.fstat(self.open(name)).st_size

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `start` (all that follow)."""
        file = self.open(name)
        wanted = max(0, self.size(name) - start) if length is None else length
        pieces: list[bytes] = []
        while wanted > 0:
            piece = os.pread(file, wanted, start)
            if not piece:
                break
            pieces.append(piece)
            start, wanted = start + len(piece), wanted - len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close all of them."""
        _close(self._files)

    def _problem(self, name: str, message: str) -> ProblemsError:
        return ProblemsError([Problem(str(self.folder / name), message)])


def _open(path: Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a named pipe in the folder must not block
    try:
        file = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:  # too many open files: a checkpoint of many ranks
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * soft), hard))
        file = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise IsADirectoryError(errno.EISDIR, "is no file", str(path))
    return file


def _close(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])
