"""Requests answered by the budgets that they name, one after the other: think small, answer full.

    tokens of a phase == what its budget's own model writes behind all tokens so far

A budget's cache means nothing to another one, so a switch fills a new cache from the tokens so far: one prefill.
Rows that run the same budget and have seen as many tokens share their forwards; a row leaves when its phase ends and
joins those that wait for its next budget. What a row writes depends on none of this: it has its own draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.tokenizer import BPETokenizer
from ..problems import Problem, ProblemsError, raise_if_any
from .family import ElasticFamily
from .requests import Completion, Part, Phase, Piece, Request, needs_text, request_problems
from .sampling import next_tokens
from .written import Written


def complete(
    family: ElasticFamily,
    requests: Sequence[Request],
    *,
    stream: Callable[[Piece], None] | None = None,
    compact: bool | None = None,
) -> list[Completion]:
    """Answer requests of any lengths and schedules; the family's active budget is afterwards what it was.

    Args:
        stream: called with every new token; those of one request come in order.
        compact: how budgets are run, as in `ElasticFamily.switch`.

    Raises:
        ProblemsError: all that is wrong with the requests, or marks in words for a family without a tokenizer.
    """
    raise_if_any(request_problems(requests, family.subnets, family.layout.architecture.vocab_size))
    if family.tokenizer is None and needs_text(requests):
        words = "until or stop is a text, and this checkpoint has no tokenizer; give the ids of tokens"
        raise ProblemsError([Problem("requests", words)])
    tokenizer = BPETokenizer(family.tokenizer).tokenizer if family.tokenizer else None
    rows = [_Row(number, request, tokenizer) for number, request in enumerate(requests)]
    waiting, before = list(rows), (family.active, family.compact)
    try:
        while waiting:
            group = _next_group(waiting, family.active)
            waiting = [row for row in waiting if row not in group]
            family.switch(group[0].phase.budget, compact=compact)
            _run_phase(family, group, stream)
            waiting += [row for row in group if row.phase is not None]
    finally:
        family.switch(before[0], compact=before[1])
    return [row.completion() for row in rows]


def _next_group(waiting: Sequence[_Row], active: str) -> list[_Row]:
    """Rows of one budget, the active one if any waits for it, and of one length, the least."""
    budgets = [row.phase.budget for row in waiting]
    budget = active if active in budgets else budgets[0]
    mine = [row for row in waiting if row.phase.budget == budget]
    shortest = min(len(row.tokens) for row in mine)
    return [row for row in mine if len(row.tokens) == shortest]


@torch.inference_mode()
def _run_phase(family: ElasticFamily, group: Sequence[_Row], stream: Callable[[Piece], None] | None) -> None:
    """Each row to the end of its phase."""
    cache = family.new_cache(len(group), room=len(group[0].tokens) + max(row.left for row in group))
    tokens = torch.tensor([row.tokens for row in group])
    while group:
        logits = family.logits(tokens, cache, last_only=True)[:, 0]
        stay = []
        for place, row in enumerate(group):
            piece, ended = row.take(row.draw(logits[place]))
            if stream is not None:
                stream(piece)
            if not ended:
                stay.append(place)
        if len(stay) < len(group):
            cache.keep(stay)
            group = [group[place] for place in stay]
        tokens = torch.tensor([row.tokens[-1:] for row in group])


class _Row:
    """A request on its way. `phase` is None when it is answered."""

    def __init__(self, number: int, request: Request, tokenizer: object) -> None:
        self.number, self.request, self.tokens = number, request, list(request.prompt)
        self.parts: list[Part] = []
        self.phase: Phase | None = request.phases[0]
        self._generator = torch.Generator().manual_seed(request.seed)
        texts = [mark for mark in request.stop if isinstance(mark, str)]
        self._written = None if tokenizer is None else Written(tokenizer, texts)
        self._begin()

    def _begin(self) -> None:
        self._first = len(self.tokens)
        self._since = len(self._written.text) if self._written else 0

    @property
    def left(self) -> int:
        """Most tokens that may still come."""
        return self.request.max_new_tokens - (len(self.tokens) - len(self.request.prompt))

    def draw(self, logits: Tensor) -> int:
        """`[v]` -> the next token."""
        chosen = next_tokens(logits[None], self.request.temperature, self.request.top_k, self._generator)
        return int(chosen)

    def take(self, token: int) -> tuple[Piece, bool]:
        """Take in a token; what is heard of it, and whether the phase has ended."""
        budget, place = self.phase.budget, len(self.parts)
        self.tokens.append(token)
        ended = self._ended(token)
        last = ended is not None and (ended == "stop" or not self.left or place + 1 == len(self.request.phases))
        text = self._written.say(last=last) if self._written else ""
        if ended:
            self.parts.append(Part(budget, len(self.tokens) - self._first, ended))
            self.phase = None if last else self.request.phases[place + 1]
            self._begin()
        return Piece(self.number, budget, token, text), ended is not None

    def _ended(self, token: int) -> str | None:
        until, most = self.phase.until, self.phase.max_tokens
        if token in self.request.stop:
            return "stop"
        if self._written:
            self._written.add(token)
            if self._written.stop():
                return "stop"
        if token == until or (isinstance(until, str) and self._written.says(until, self._since)):
            return "until"
        if most == len(self.tokens) - self._first:
            return "max_tokens"
        return None if self.left else "max_new_tokens"

    def completion(self) -> Completion:
        """The answer."""
        new = tuple(self.tokens[len(self.request.prompt) :])
        return Completion(new, self._written.text if self._written else None, tuple(self.parts))
