"""What a row has written, as text that grows by tokens: where a mark is completed, and what may be said already.

said(token 1) + said(token 2) + ... + said(last) == text up to the stop
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Written:
    """The text of one row.

    Args:
        tokenizer: special tokens are shown, as `</think>` may be one.
        stops: texts of which none may be said, nor what they begin with.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = DecodeStream(skip_special_tokens=False)  # keeps back what is half a character
        self._said = 0
        self.text = ""

    def add(self, token: int) -> None:
        """Take in a token."""
        self.text += self._stream.step(self._tokenizer, token) or ""

    def stop(self) -> bool:
        """Whether one of `stops` is there; the text then ends in front of the first of them."""
        found = [place for stop in self._stops if (place := self.text.find(stop, self._said)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def says(self, mark: str, since: int) -> bool:
        """Whether `mark` stands behind the first `since` characters."""
        return self.text.find(mark, since) >= 0

    def say(self, *, last: bool) -> str:
        """What is new and can be said: but for the `last` time, all that no stop can begin with any more."""
        end = len(self.text) if last else len(self.text) - self._held()
        new, self._said = self.text[self._said : end], max(self._said, end)
        return new

    def _held(self) -> int:
        lengths = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)
