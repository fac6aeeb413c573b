"""The run's own log: one JSON object a line, one file a kind, readable while it is written and after a crash."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """Appends records to `folder/KIND.jsonl`; a resumed run goes on there, and the last record of a step counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

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
