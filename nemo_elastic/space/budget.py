"""What a subnet has to meet: a fraction of the parent's parameters, a count, memory or latency; and its name."""

import re
from dataclasses import dataclass

from ..problems import Problem, ProblemsError, raise_if_any

PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def name_problems(name: str, key: str = "elastic.budgets") -> list[Problem]:
    """Why `name` is no name for a budget: folders, files and columns are called by it."""
    if PLAIN_WORD.fullmatch(name):
        return []
    words = f"{name!r} is no name for a budget: a folder is called by it; use up to 64 letters, digits and . _ + -, "
    return [Problem(key, words + "with a letter or digit first")]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a child may cost, `value` in units of `kind`: `fraction` (of the parent's parameters) or one of KINDS.

    `active_parameters` are those that one token passes through: all of them without a mixture of experts.
    """

    name: str
    kind: str
    value: float

    KINDS = ("fraction", "parameters", "active_parameters", "memory_gb", "latency_ms")

    def __post_init__(self) -> None:
        key = f"elastic.budgets.{self.name}"
        raise_if_any(name_problems(self.name))
        if self.kind not in self.KINDS:
            raise ProblemsError([Problem(key, f"kind {self.kind!r} must be one of {', '.join(self.KINDS)}")])
        if not self.value > 0 or (self.kind == "fraction" and self.value > 1):
            rule = "must be above 0 and at most 1" if self.kind == "fraction" else "must be above 0"
            raise ProblemsError([Problem(key, f"{self.value} {rule} (a {self.kind} budget)")])

    @property
    def is_full(self) -> bool:
        """The parent itself: pinned to the full network, never learned (METHOD section 9)."""
        return self.kind == "fraction" and self.value == 1.0
