"""Problems a user can mend: each names the key, the value, the rule and the remedy; all are reported at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One broken rule. `key` is the user's own dotted key, `message` says value, rule and remedy."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class ProblemsError(ValueError):
    """Bad input; carries every problem found. The command line prints them and leaves with exit code 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Stopped(Exception):
    """A run was asked to stop (SIGTERM), has saved its state and can go on. Exit code 143."""


def raise_if_any(problems: Iterable[Problem]) -> None:
    """Raise `ProblemsError` with all of `problems`, or return when there are none."""
    problems = tuple(problems)
    if problems:
        raise ProblemsError(problems)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the nearest of `known`, else the list of what is known."""
    known = sorted(known)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 24 else ""


def nearest_multiples(value: float, multiple: int, highest: int) -> str:
    """The legal neighbours of `value`, as words for a message: `'48, 56'`."""
    below = min(int(value // multiple) * multiple, highest // multiple * multiple)
    above = below + multiple
    legal = [n for n in (below, above) if 0 < n <= highest]
    return ", ".join(map(str, legal))
