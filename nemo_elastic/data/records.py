"""Records of `.jsonl` and Parquet files, and blocks of plain text, one after the other, each with its place.

A `.jsonl` has an object a line, a Parquet file a row; where a row says null it says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_elastic.data.text_files import PARQUET, kind_of
from nemo_elastic.data.unpack import Growth, lines, pyarrow_for

TEXT_COLUMNS = ("text",)
CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools")
_BLOCK_CHARACTERS = 4096
_LONGEST_PIECE = 1 << 20  # characters: a longer line of a `.txt` is cut
_ROWS = 64  # of Parquet, at once in memory

Place = tuple[Path, str]


def records(file: Path, columns: Sequence[str]) -> Iterator[tuple[Place, Any]]:
    """((file, `line N` or `row N`), value) of a `.jsonl` or Parquet file; of the latter only the named columns.

    Raises:
        ValueError: names file and line or row.
    """
    yield from _rows(file, columns) if kind_of(file) == PARQUET else _json_lines(file)


def _json_lines(file: Path) -> Iterator[tuple[Place, Any]]:
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"{file} line {number} is nested too deeply to be read; leave the line out") from error
        except ValueError as error:
            raise ValueError(f"{file} line {number} is not JSON") from error
        yield (file, f"line {number}"), value


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[Place, Any]]:
    arrow, number, growth = pyarrow_for(file), 0, Growth(file)
    try:
        with arrow.parquet.ParquetFile(file) as table:
            wanted = [name for name in columns if name in table.schema_arrow.names]
            if not wanted:
                words = f"has the columns {', '.join(table.schema_arrow.names)}; one must be {' or '.join(columns)}"
                raise ValueError(words)
            for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
                growth.add(batch.nbytes)
                for row in batch.to_pylist():
                    number += 1
                    yield (file, f"row {number}"), _without_nulls(row)
    except (OSError, arrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged behind row {number} ({reason}); copy the file again") from error
    except ValueError as error:
        words = str(error)
        raise ValueError(words if words.startswith(str(file)) else f"{file} {words}") from error


def _without_nulls(value: Any) -> Any:
    """A struct of Parquet has every field in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def texts(file: Path) -> Iterator[str]:
    """Documents of a `.jsonl` or Parquet file, key `text`. Empty ones are passed over.

    Raises:
        ValueError: names file and line or row.
    """
    for (_, place), value in records(file, TEXT_COLUMNS):
        if not isinstance(value, dict) or "text" not in value:
            words = f'{file} {place} is not an object with "text"'
            if isinstance(value, dict) and any(name in value for name in CHAT_COLUMNS):
                words += f"; conversations are read as a source of data.blend: data.blend=[{{path: {file}}}]"
            raise ValueError(words)
        if not isinstance(value["text"], str):
            raise ValueError(f'{file} {place} has a "text" that is not a string')
        if value["text"]:
            yield value["text"]


def blocks(file: Path) -> Iterator[str]:
    """A `.txt` in blocks of whole lines, about 4,096 characters each; what has no line ends is cut at 1 Mi characters.

    Raises:
        ValueError: names file and line.
    """
    block: list[str] = []
    size = 0
    for _, line in lines(file, _LONGEST_PIECE, cut=True):
        block.append(line)
        size += len(line)
        if size >= _BLOCK_CHARACTERS:
            yield "".join(block)
            block, size = [], 0
    if "".join(block).strip():
        yield "".join(block)
