"""What is asked of a family: a prompt, and which budget continues it from where to where.

    request = Request(prompt=ids, phases=think_then_answer("small", "full"), max_new_tokens=200)

A phase ends behind the token that completes its `until`, or after its `max_tokens`; the next one goes on with another
budget, from all tokens so far. The end of the last one is the end of the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..problems import Problem, did_you_mean

END_OF_THINKING = "</think>"
Mark = str | int  # a text, or the id of one token


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of new tokens by one budget.

    Attributes:
        until: the phase ends behind the token that completes this text, or that is this id. Only what the phase itself
            says counts.
        max_tokens: it ends after so many, whatever they say.
    """

    budget: str
    until: Mark | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row: a prompt and how it is continued.

    Attributes:
        prompt: ids, not none of them.
        phases: in order; all but the last say where they end.
        max_new_tokens: over all phases.
        temperature: 0: the likeliest token. Else drawn, by a generator of this row's own `seed`.
        top_k: draw among so many.
        stop: the request ends with the token that completes one of these texts, or that is one of these ids.
    """

    prompt: Sequence[int]
    phases: tuple[Phase, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    stop: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Part:
    """What a phase wrote: so many tokens, ended by `until`, `max_tokens`, `stop` or `max_new_tokens`."""

    budget: str
    tokens: int
    ended: str


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    Attributes:
        tokens: all new ones, what stopped them too.
        text: what they say up to the stop; None where the family has no tokenizer.
        parts: by phase, those that began.
    """

    tokens: tuple[int, ...]
    text: str | None
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"text": self.text, "tokens": list(self.tokens), "parts": [vars(part) for part in self.parts]}


@dataclass(frozen=True)
class Piece:
    """What a stream hears of: one new token.

    Attributes:
        request: its place among the requests.
        text: what can be said now: all pieces of a request, joined, are its text. Empty while it may still become a
            stop, or is half a character.
    """

    request: int
    budget: str
    token: int
    text: str


def think_then_answer(
    think: str, answer: str, *, until: Mark | None = END_OF_THINKING, max_tokens: int | None = None
) -> tuple[Phase, Phase]:
    """One budget thinks until a mark or for so many tokens, another one answers."""
    return Phase(budget=think, until=until, max_tokens=max_tokens), Phase(budget=answer)


def needs_text(requests: Iterable[Request]) -> bool:
    """Whether a mark is a text, which takes a tokenizer."""
    return any(isinstance(m, str) for r in requests for m in (*r.stop, *(p.until for p in r.phases)))


def request_problems(requests: Sequence[Request], budgets: Mapping[str, Any], vocab_size: int) -> Iterator[Problem]:
    """Everything that is wrong, by request.

    Args:
        budgets: those of the family, by name.
    """
    for number, request in enumerate(requests):
        key = f"requests[{number}]"
        if not len(request.prompt):
            yield Problem(f"{key}.prompt", "is empty; it must have at least one token")
        beyond = [t for t in request.prompt if not 0 <= t < vocab_size]
        if beyond:
            yield Problem(f"{key}.prompt", f"token {beyond[0]} must be below the parent's vocab_size={vocab_size}")
        for name, value in (("max_new_tokens", request.max_new_tokens), ("top_k", request.top_k)):
            if value is not None and value < 1:
                yield Problem(f"{key}.{name}", f"{value} must be at least 1")
        if not 0 <= request.temperature < float("inf"):
            yield Problem(f"{key}.temperature", f"{request.temperature} must be at least 0")
        if "" in request.stop:
            yield Problem(f"{key}.stop", "'' is in every text; name what ends the request")
        yield from _phase_problems(key, request.phases, budgets)


def _phase_problems(key: str, phases: tuple[Phase, ...], budgets: Mapping[str, Any]) -> Iterator[Problem]:
    if not phases:
        yield Problem(f"{key}.phases", "are none; name the budget that continues the prompt")
    for place, phase in enumerate(phases):
        mine = f"{key}.phases[{place}]"
        if phase.budget not in budgets:
            yield Problem(
                f"{mine}.budget", f"{phase.budget!r} is not in this family{did_you_mean(phase.budget, budgets)}"
            )
        if phase.max_tokens is not None and phase.max_tokens < 1:
            yield Problem(f"{mine}.max_tokens", f"{phase.max_tokens} must be at least 1")
        if phase.until == "":
            yield Problem(f"{mine}.until", "'' is in every text; name what ends the phase")
        if phase is not phases[-1] and phase.until is None and phase.max_tokens is None:
            yield Problem(mine, "never ends, so that the next phase never begins; give until or max_tokens")
