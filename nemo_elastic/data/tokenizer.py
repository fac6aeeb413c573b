"""A byte-level BPE tokenizer: trained once with `tokenizers`, shipped with the tiny parent, never downloaded.

    decode(encode(text)) == text      for every text: the alphabet is all 256 bytes

Half a surrogate pair, which JSON can spell and Unicode text cannot have, is read as U+FFFD.

Digits are single tokens (numbers of any length are spelt the same way); runs of spaces are one token
where the merges found them, which is what makes source code short.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_elastic.config.special_tokens import END_OF_TEXT, PAD, end_of_text, padding, token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
_HALF_PAIR = re.compile("[\ud800-\udfff]")
DEFAULT_TOKENIZER = Path(__file__).parent.parent / "assets" / "tiny_parent" / "tokenizer.json"


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens; ids 0 and 1 are end of text and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} cannot be reached: the text has merges for {tokenizer.get_vocab_size()} "
            "tokens; use more text or a smaller vocabulary"
        )
    return tokenizer


def well_formed(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair."""
    return text if text.isascii() else _HALF_PAIR.sub("\ufffd", text)


class BPETokenizer:
    """A tokenizer file with the few names the rest of the package needs.

    Args:
        path: a `tokenizer.json` of the `tokenizers` package, or a folder with one.
        end: the token that ends a text, or its id; None: what the files beside `path` say (`special_tokens`).
        pad: the id that fills up a row; None: what those files say.

    Raises:
        ValueError: the file is missing, cannot be read, gives ids that the library does not keep, or nobody says which
            token ends a text.
    """

    def __init__(
        self, path: str | Path = DEFAULT_TOKENIZER, end: str | int | None = None, pad: int | None = None
    ) -> None:
        from tokenizers import Tokenizer

        self.path = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise ValueError(f"data.tokenizer={path}: no such file; give the path of a tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises bare Exception for every defect of the file
            raise ValueError(
                f"data.tokenizer={path} is not a tokenizer.json of `tokenizers`: {str(error)[:120]}"
            ) from error
        ids = token_ids(self.path)
        for token, number in ids.items():
            if (kept := self.tokenizer.token_to_id(token)) != number:
                raise ValueError(
                    f"data.tokenizer={path}: {token!r} has id {number} in the file, but `tokenizers` gives it {kept} "
                    "(it numbers added tokens on from the vocabulary); list it in model.vocab as well"
                )
        self.tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
        self.eod: int = end_of_text(self.path, ids, end)
        self.pad_id: int = padding(self.path, ids, self.eod) if pad is None else pad
        self.vocab_size: int = max(ids.values()) + 1  # one more than the largest id: there may be holes

    @property
    def sha256(self) -> str:
        """The identity of this tokenizer in caches and manifests: the file's hash, and what ends a text if it is not
        the usual name.
        """
        digest = hashlib.sha256(self.path.read_bytes())
        if self.eod != self.tokenizer.token_to_id(END_OF_TEXT):
            digest.update(f"end of text {self.eod}".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token added."""
        return self.tokenizer.encode(well_formed(text), add_special_tokens=False).ids

    def encode_markers(self, text: str) -> list[int]:
        """Ids of a template's text, in which the names of special tokens are those tokens."""
        self.tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.tokenizer.encode_special_tokens = True

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_markers` with the characters `[begin, end)` of the text that each token spells."""
        self.tokenizer.encode_special_tokens = False
        try:
            found = self.tokenizer.encode(well_formed(text), add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = True
        return found.ids, found.offsets

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are special tokens: no text spells them."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, encoded in parallel."""
        return [e.ids for e in self.tokenizer.encode_batch([*map(well_formed, texts)], add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
