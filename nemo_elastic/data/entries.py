"""What `data.paths` and an entry of `data.blend` name, and whether it is there. Looks at names and sizes only."""

from __future__ import annotations

from pathlib import Path

from nemo_elastic.config.sections import DataConfig
from nemo_elastic.data.text_files import ENDINGS, find_text_files
from nemo_elastic.problems import Problem

CORPUS = "builtin:corpus"


def prefix_of(path: str | Path) -> str | None:
    """The prefix of a Megatron pair that `path` names, with or without its ending; None when it names none.

    Raises:
        ValueError: half of the pair is missing, or its text is empty.
    """
    prefix = str(path).removesuffix(".bin").removesuffix(".idx")
    there = {end: Path(prefix + end) for end in (".bin", ".idx") if Path(prefix + end).is_file()}
    if not there:
        return None
    for end in (".bin", ".idx"):
        if end not in there:
            words = f"is missing beside {next(iter(there.values())).name}; copy both files of the pair"
            raise ValueError(f"{prefix}{end} {words}")
    if not there[".bin"].stat().st_size:
        raise ValueError(f"{prefix}.bin is empty; make the pair again with Megatron's tools/preprocess_data.py")
    return prefix


def text_files(path: str | Path) -> list[Path]:
    """The text files that an entry names.

    Raises:
        ValueError: nothing is there, or nothing that is text.
    """
    try:
        return find_text_files([path])
    except ValueError as error:
        words = str(error).removeprefix("data.paths: ").split("; give text files")[0]
        kinds = f"files that end in {ENDINGS}, a folder of them, the prefix of a .bin/.idx pair, or {CORPUS}"
        raise ValueError(f"{words}; give {kinds}") from error


def entry_problems(data: DataConfig) -> list[Problem]:
    """Every entry of `data.paths` and `data.blend` that is not there."""
    found = []
    try:
        find_text_files(data.paths)
    except (ValueError, OSError) as error:
        found.append(Problem("data.paths", str(error).removeprefix("data.paths: ")))
    for i, entry in enumerate(data.blend):
        try:
            if entry.path != CORPUS and prefix_of(entry.path) is None:
                text_files(entry.path)
        except (ValueError, OSError) as error:
            found.append(Problem(f"data.blend.{i}.path", str(error)))
    return found
