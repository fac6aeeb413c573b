"""`importance.json`, what `rank` says of its scores: read and checked in one place, for whoever needs the scores.

    importance.safetensors    scores of widths, `DIM.LAYER` [units]
    importance.json           format, architecture, depth ranking and scores, provenance, SHA-256 of the other file

No torch: `plan --search` reads the same files as `sort` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import read_json
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import Architecture

DESCRIPTION, TENSORS = "importance.json", "importance.safetensors"
FORMAT = 1
_KINDS: Mapping[str, type] = {
    "architecture": dict, "depth_ranking": list, "depth_scores": dict, "sha256": dict, "provenance": dict,
}  # fmt: skip


def read_description(folder: Path, architecture: Architecture) -> dict[str, Any]:
    """The description of the scores in `folder`, that of this parent, and of the file of tensors beside it.

    Raises:
        ProblemsError: missing, torn, foreign or ill-shaped; the message says what to do.
    """
    path, tensors = folder / DESCRIPTION, folder / TENSORS
    try:
        found = read_json(path)
    except FileNotFoundError as error:
        raise ProblemsError([Problem(str(path), "does not exist; run `nemo-elastic rank` first")]) from error
    except (OSError, ValueError) as error:
        raise ProblemsError([Problem(str(path), f"cannot be read ({error}); rank again")]) from error
    kinds = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in _KINDS.items())
    if not kinds or "format" not in found or "hidden_size" not in found["architecture"] or not _numbers(found):
        raise ProblemsError([Problem(str(path), "is no description of importance scores; rank again")])
    if found["format"] != FORMAT:
        raise ProblemsError([Problem(str(path), f"has format {found['format']}, this version reads {FORMAT}")])
    if not tensors.is_file() or _digest(tensors) != found["sha256"].get(TENSORS):
        words = f"{TENSORS} is missing or not the one {DESCRIPTION} describes; rank again"
        raise ProblemsError([Problem(str(folder), words)])
    ours, theirs = asdict(architecture), found["architecture"]
    raise_if_any(
        Problem(f"{folder}.architecture.{k}", f"was ranked with {v}, the parent has {ours.get(k)}; rank again")
        for k, v in theirs.items()
        if ours.get(k) != v
    )
    return found


def _numbers(found: Mapping[str, Any]) -> bool:
    scores = found["depth_scores"]
    return all(key.isdecimal() and isinstance(score, int | float) for key, score in scores.items()) and all(
        type(layer) is int for layer in found["depth_ranking"]
    )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
