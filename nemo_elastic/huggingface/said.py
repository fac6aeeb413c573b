"""A config.json that is being read: what it says under one of several names, and every problem with it, by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..problems import Problem


@dataclass
class Said:
    """`config` as read from `file`, which problems name; `problems` are noted, not raised."""

    config: Mapping[str, Any]
    file: str | Path = "config.json"
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, key: str, words: str) -> None:
        """Note what is wrong with a key."""
        self.problems.append(Problem(f"{self.file}: {key}", words))

    def value(self, names: Iterable[str]) -> Any:
        """What the given ones of several names of one thing say; None for nothing."""
        given = {name: self.config[name] for name in names if self.config.get(name) is not None}
        return self.agreed(given)

    def agreed(self, given: Mapping[str, Any]) -> Any:
        """The one value of several keys; another one is noted as stale."""
        first = next(iter(given.values()), None)
        for name, value in given.items():
            if value != first:
                words = f"{value!r} says another value than {next(iter(given))}, {first!r}; one of them is stale"
                self.wrong(name, words)
        return first

    def number(self, key: str, value: Any) -> float | None:
        """A number of a key, above 0; None and a problem where it is none."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.wrong(key, "is not given" if value is None else f"{value!r} must be a number above 0")
            return None
        return float(value)
