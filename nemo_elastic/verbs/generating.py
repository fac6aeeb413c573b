"""`generate`: what is asked of a family, and whether it can be answered."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..problems import Problem, did_you_mean

UNTIL = "</think>"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A prompt, and who continues it: `budget`, or `think` until `until` and `answer` to the end.

    Attributes:
        until: what ends the thinking; None: `</think>`.
        think_tokens: it ends after so many at the latest.
        temperature: 0: the likeliest token; else drawn, among `top_k`, by `seed`.
        stop: texts that end the answer.
    """

    prompt: str | None
    budget: str | None = None
    think: str | None = None
    answer: str | None = None
    until: str | None = None
    think_tokens: int | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def problems(self) -> Iterator[Problem]:
        """What does not go together."""
        if not self.prompt:
            yield Problem("--prompt", "give the text to continue, or - to read it from stdin")
        if bool(self.budget) == bool(self.think or self.answer):
            yield Problem("--budget", "give one budget by --budget NAME, or two by --think NAME --answer NAME")
        elif not self.budget and not (self.think and self.answer):
            lacks = "--answer" if self.think else "--think"
            yield Problem(lacks, "give both --think NAME and --answer NAME, or one budget by --budget NAME")
        for flag in ("until", "think_tokens"):
            if self.budget and getattr(self, flag) is not None:
                yield Problem(f"--{flag.replace('_', '-')}", "says where thinking ends; add --think and --answer")
        for flag in ("think_tokens", "max_new_tokens", "top_k"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                yield Problem(f"--{flag.replace('_', '-')}", f"{value} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            yield Problem("--temperature", f"{self.temperature} must be at least 0")
        if not -(2**63) <= self.seed < 2**64:
            yield Problem("--seed", f"{self.seed} must be a number of 64 bits")
        if self.until == "" or "" in self.stop:
            yield Problem("--until" if self.until == "" else "--stop", "'' is in every text; give one that is not")

    def budget_problems(self, known: Collection[str]) -> Iterator[Problem]:
        """Budgets that the family has not."""
        for flag in ("budget", "think", "answer"):
            name = getattr(self, flag)
            if name and name not in known:
                yield Problem(f"--{flag}", f"{name!r} is not in this family{did_you_mean(name, known)}")
