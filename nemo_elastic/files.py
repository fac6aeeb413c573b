"""Small files written whole: temporary name, fsync, rename. And whether a folder can be written in at all."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from .problems import Problem


def folder_problems(key: str, folder: str | Path) -> list[Problem]:
    """Why nothing can be written in `folder`: a folder is made in what there is of its path, and removed again.

    Its name is nobody else's, so that all processes of a run may ask at once.
    """
    folder = Path(folder).absolute()
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            return [Problem(key, f"{str(nearest)!r} is a file, not a folder; give another path")]
        if not os.access(nearest, os.W_OK | os.X_OK):
            return [Problem(key, f"{str(nearest)!r} is not yours to write in; give another path")]
        probe = nearest / f".{uuid.uuid4().hex}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return [Problem(key, f"{str(folder)!r} cannot be made ({error.strerror}); give another path")]
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
