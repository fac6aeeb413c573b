"""Let every user of an image run this interpreter and read its packages: images that use uv keep Python under /root.

    python3 scripts/open_python.py        # as root, before the image changes its user

Folders above it may be entered (not listed), the interpreter and its packages may be read. What may be already stays as
it is, so that an image that is fine gets no new layer of files. The last step is the question itself, asked as a user
without any rights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

NOBODY = 65534
ENTER, READ, SETS_USER = 0o001, 0o004, 0o6000


def used() -> tuple[list[Path], list[Path]]:
    """(files, folders) that this interpreter needs to start and to import what is installed."""
    own = [Path(sys.executable), Path(os.path.realpath(sys.executable)), Path(sys.prefix, "pyvenv.cfg")]
    own += Path(sys.base_prefix, "lib").glob("libpython*")
    folders = {Path(os.path.realpath(path)) for name, path in sysconfig.get_paths().items() if name.endswith("lib")}
    return [path for path in own if path.exists()], sorted(folders)


def lacking(files: Iterable[Path], folders: Iterable[Path]) -> dict[Path, int]:
    """Path -> the mode that it should have, for all that others may not use yet."""
    found: dict[Path, int] = {}

    def want(path: Path, bits: int) -> None:
        mode = found.get(path, path.stat().st_mode & 0o7777)
        if mode & bits != bits:
            found[path] = mode | bits

    def want_file(path: Path) -> None:
        if path.is_file() and not path.stat().st_mode & SETS_USER:
            want(path, READ | (ENTER if path.stat().st_mode & 0o100 else 0))

    for path in (*files, *folders):
        for above in path.parents:
            want(above, ENTER)
    for path in files:
        want_file(path)
    for top in folders:
        for folder, _, names in os.walk(top):
            want(Path(folder), ENTER | READ)
            for name in names:
                want_file(Path(folder, name))
    return found


def main() -> int:
    """1 when a user without rights still cannot start the interpreter."""
    changed = lacking(*used())
    for path, mode in changed.items():
        path.chmod(mode)
    print(f"{sys.executable}: {len(changed)} paths opened")
    command = [sys.executable, "-c", "import encodings"]
    try:
        return subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/").returncode
    except PermissionError as error:
        print(f"a user without rights still cannot start it: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
