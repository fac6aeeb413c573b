"""Folders that appear whole or not at all.

`atomic_folder` gives a temporary sibling of the target; only when its block ends without an error is everything synced
and renamed to the target. An existing target is never touched without `force`, and with it is replaced by that one
rename.
"""

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import folder_problems
from ..problems import Problem, ProblemsError, raise_if_any
from ..processes.run_parts import MARKS

logger = logging.getLogger(__name__)
PARTIAL = ".partial-"


@contextmanager
def atomic_folder(out: str | os.PathLike[str], *, force: bool = False, needs_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block succeeds; after an error nothing of it is left.

    Args:
        force: replace an existing `out`.
        needs_bytes: refuse at once where the disk has less room.

    Raises:
        ProblemsError: `out` exists (without `force`), is not a folder, or the disk is full.
    """
    out = Path(out).absolute()
    check_target(out, force)
    raise_if_any(folder_problems("--out", out.parent))
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(out)
    free = shutil.disk_usage(out.parent).free
    if needs_bytes > free:
        raise _disk_full(out, f"{needs_bytes / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB free")
    temporary = out.with_name(f".{out.name}{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        _replace(out, temporary, force)
    except Exception as error:
        full = _refused_write(error)
        if full is None:
            raise
        raise _disk_full(out, f"it filled up while writing ({full.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refused_write(error: BaseException | None) -> OSError | None:
    """The "no room" that lies behind an error: torch.save answers a failing write with an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


# By one of these files a folder is told to be something that this program wrote, or would have.
WRITTEN = ("elastic/manifest.json", "sorted.json", "weights/.metadata", "weights/metadata.json", "config.json")


def check_target(out: str | os.PathLike[str], force: bool, source: str | os.PathLike[str] | None = None) -> None:
    """Refuse an `out` that would overwrite something, before any work is done for it.

    `force` gives up one checkpoint, never a folder of them, and never what is being read.

    Args:
        source: the folder that is read for `out`.

    Raises:
        ProblemsError: keyed `--out`.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ProblemsError([Problem("--out", f"{out} exists and is not a folder; give another path")])
    if source is not None:
        here, read = out.resolve(), Path(source).resolve()
        if here in (read, *read.parents) or read in here.parents:
            words = f"{out} is, holds or lies in {source}, which is read; give another path"
            raise ProblemsError([Problem("--out", words)])
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise ProblemsError([Problem("--out", f"{out} exists; add --force to replace it, or give another path")])
    run = [name for name in MARKS if (out / name).exists()]
    if run or not any((out / name).exists() for name in WRITTEN):
        what = f"a run folder ({', '.join(run)})" if run else "no checkpoint or child"
        words = f"{out} is {what}, and --force replaces nothing else; remove it yourself, or give another path"
        raise ProblemsError([Problem("--out", words)])


def _replace(out: Path, temporary: Path, force: bool) -> None:
    check_target(out, force)
    old = None
    if out.exists():
        old = out.with_name(f".{out.name}{PARTIAL}{os.getpid()}-old-{uuid.uuid4().hex[:8]}")
        os.rename(out, old)
    try:
        os.rename(temporary, out)
    except OSError:
        if old is not None:
            os.rename(old, out)
        raise
    _sync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _remove_left_over(out: Path) -> None:
    """Temporary folders of `out` whose process is gone (it was killed)."""
    prefix = f".{out.name}{PARTIAL}"
    for folder in out.parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink():
            continue
        pid = folder.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            if "-old-" in folder.name and not out.exists():
                logger.warning("%s is what a killed run moved away from %s; restored", folder, out)
                os.rename(folder, out)
                continue
            logger.info("removing %s, left over from a killed run", folder)
            shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """fsync every file and folder below `folder`, deepest first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _disk_full(out: Path, why: str) -> ProblemsError:
    words = f"the disk of {out.parent} is full: {why}; nothing was changed, make room or give another --out"
    return ProblemsError([Problem("--out", words)])
