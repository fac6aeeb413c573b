"""Small files written whole: temporary name, fsync, rename. And whether a folder can be written in at all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .problems import Problem


def folder_problems(key: str, folder: str | Path) -> list[Problem]:
    """Why nothing can be written in `folder`: it is made, with what leads to it, and what was made is removed again."""
    folder = Path(folder).absolute()
    wanted = [p for p in (folder, *folder.parents) if not p.exists()]
    nearest = wanted[-1].parent if wanted else folder
    made: list[Path] = []
    try:
        if not nearest.is_dir():
            return [Problem(key, f"{str(nearest)!r} is a file, not a folder; give another path")]
        for path in reversed(wanted):
            path.mkdir()
            made.append(path)
        if not os.access(folder, os.W_OK | os.X_OK):
            return [Problem(key, f"{str(folder)!r} is not yours to write in; give another path")]
    except OSError as error:
        return [Problem(key, f"{str(folder)!r} cannot be made ({error.strerror}); give another path")]
    finally:
        for path in reversed(made):
            with suppress(OSError):  # somebody else is using it by now
                path.rmdir()
    return []


def write_text(path: Path, text: str) -> Path:
    """Replace `path` by `text`, or leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_text` of indented JSON."""
    return write_text(path, json.dumps(value, indent=2) + "\n")
