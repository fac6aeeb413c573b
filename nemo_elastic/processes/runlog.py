"""The run's own log: JSON lines and one CSV table, readable while they are written and after a crash."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text


class RunLog:
    """Appends records to `folder/KIND.jsonl`; a resumed run goes on there, and the last record of a step counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{kind}.jsonl"
        begin = "" if _ends_with_newline(path) else "\n"  # a line that a kill cut off stays a line of its own
        with path.open("a", encoding="utf-8") as file:
            file.write(begin + json.dumps(record) + "\n")

    def read(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind by step; a half-written last line (a kill) is left out."""
        path = self.folder / f"{kind}.jsonl"
        by_step: dict[int, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            by_step[record["step"]] = record
        return [by_step[step] for step in sorted(by_step)]


class MetricsFile:
    """A CSV table with fixed columns, `step` first, that only grows; a resumed run first drops what it will repeat.

    Args:
        columns: all names; the first is `step`.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def rewind(self, step: int) -> None:
        """Keep the rows up to `step` (0: none), and begin the file where there is none."""
        kept = [r for r in self.read() if int(r["step"]) <= step] if step else []
        columns = list(dict.fromkeys([*(kept[0] if kept else ()), *self.columns]))
        self.columns = columns
        lines = [columns, *([row.get(c, "") for c in columns] for row in kept)]
        write_text(self.path, "".join(_csv_line(line) for line in lines))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that it does not name stay empty."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_csv_line([row.get(c, "") for c in self.columns]))

    def read(self) -> list[dict[str, str]]:
        """All whole rows; a half-written last line (a kill) is left out."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:] if len(row) == len(rows[0])] if rows else []


def _csv_line(values: Sequence[Any]) -> str:
    cells = [f"{v:.10g}" if isinstance(v, float) else str(v) for v in values]
    return ",".join(f'"{c}"' if "," in c or '"' in c else c for c in cells) + "\n"


def _ends_with_newline(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
