"""Which files are text, by their names, as published data sets carry them.

    name = stem KIND PACKING

KIND is `.txt`, `.jsonl` or `.parquet`; PACKING is nothing, `.gz`, `.bz2`, `.xz` or `.zst` (Parquet packs by itself).
What macOS leaves beside files that it copies to other systems (`._name`: AppleDouble, RFC 1740) has such names, too,
and is no text: its first four bytes say so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

PARQUET = ".parquet"
KINDS = (".txt", ".jsonl", PARQUET)
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
ENDINGS = f"{', '.join(KINDS[:-1])} or {PARQUET} (the first two also with {', '.join(PACKINGS)})"
_APPLE_DOUBLE = b"\x00\x05\x16\x07"


def kind_and_packing(file: Path) -> tuple[str, str] | None:
    """(kind, packing or '') by the name; None when it is no text's name."""
    name = file.name.lower()
    packing = next((p for p in PACKINGS if name.endswith(p)), "")
    kind = next((k for k in KINDS if name.removesuffix(packing).endswith(k)), None)
    return None if kind is None or (kind == PARQUET and packing) else (kind, packing)


def kind_of(file: Path) -> str:
    """`.txt`, `.jsonl` or `.parquet` of a file that `find_text_files` gave."""
    found = kind_and_packing(file)
    assert found is not None, file
    return found[0]


def find_text_files(paths: Sequence[str | Path]) -> list[Path]:
    """The text files among and under `paths`, sorted inside each folder; a note says what macOS left there.

    Raises:
        ValueError: a path is missing, a file has another ending or is empty, a folder has no such file.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind_and_packing(p) and p.is_file() and p.stat().st_size)
            forks = [p for p in inside if _is_apple_double(p)]
            if forks:
                logger.warning(
                    "%s: %d files that macOS left beside its own (%s) are left out", path, len(forks), forks[0]
                )
            files += [p for p in inside if p not in forks]
            if len(inside) == len(forks):
                problems.append(f"{path} has no file with text in it that ends in {ENDINGS}")
        elif not path.is_file():
            problems.append(f"{path} does not exist")
        elif kind_and_packing(path) is None:
            problems.append(f"{path} must end in {ENDINGS}")
        elif not path.stat().st_size:
            problems.append(f"{path} is empty")
        elif not os.access(path, os.R_OK):
            problems.append(f"{path} is not yours to read")
        elif _is_apple_double(path):
            problems.append(f"{path} is what macOS keeps beside a file, not the file; give {path.name[2:]}")
        else:
            files.append(path)
    if problems:
        raise ValueError(f"data.paths: {'; '.join(problems)}; give text files, or leave data.paths empty")
    return files


def _is_apple_double(file: Path) -> bool:
    if not file.name.startswith("._"):
        return False
    with file.open("rb") as content:
        return content.read(len(_APPLE_DOUBLE)) == _APPLE_DOUBLE
