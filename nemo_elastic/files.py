"""Small files: read with one kind of error, written whole (temporary name, fsync, rename); folders to write in."""

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


def output_problems(key: str, file: Path, *, force: bool) -> list[Problem]:
    """Why `file` cannot be written; with `force` it may be there."""
    if file.exists() and not force:
        return [Problem(key, f"{str(file)!r} is there already; replace it with --force")]
    if file.is_dir():
        return [Problem(key, f"{str(file)!r} is a folder; name a file")]
    return folder_problems(key, file.parent)


def parse_json(text: str | bytes) -> Any:
    """The value that JSON holds.

    Raises:
        ValueError: it is none, or nested more deeply than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file (UTF-8, with or without a mark of byte order).

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no JSON, no text or no file.
    """
    return parse_json(_text(path))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of plain values.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no YAML, no text or no file.
    """
    import yaml

    try:
        return yaml.safe_load(_text(path))
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {str(error).splitlines()[0]}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


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
