"""A config.json that is being read: what it says under one of several names, and every problem with it, by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..problems import Problem

LARGEST = 1e30  # of a number that decides what is computed


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
        first, *others = given or (None,)
        for name in others:
            if given[name] != given[first]:
                words = f"{given[name]!r} says another value than {first}, {given[first]!r}; one of them is stale"
                self.wrong(name, words)
        return given.get(first)

    def number(self, key: str, value: Any) -> float | None:
        """A number of a key, above 0; None and a problem where it is none."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            words = f"{repr(value)[:40]} must be a number above 0 and of at most {LARGEST:g}"
            self.wrong(key, "is not given" if value is None else words)
            return None
        return float(value)
