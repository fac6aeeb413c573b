"""The BPE tokenizer as NeMo wants it: a `TokenizerSpec` whose file NeMo copies into a checkpoint's `context/`.

NeMo re-creates it from its captured argument (`tokenizer_file`), which `FileArtifact` rewrites to the copy,
so a checkpoint carries its own tokenizer and nothing is downloaded.
"""

from __future__ import annotations

from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
from nemo.lightning import io
from nemo.lightning.io.artifact import FileArtifact

from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER, BPETokenizer


class ElasticTokenizer(TokenizerSpec):
    """A `tokenizer.json` of the `tokenizers` package.

    Args:
        tokenizer_file: path of the file.
        eod_id, pad_id: end of text and padding; they travel with the file, as what lies beside it does not.
    """

    def __init__(self, tokenizer_file: str, eod_id: int | None = None, pad_id: int | None = None) -> None:
        self.tokenizer_file = tokenizer_file
        self.bpe = BPETokenizer(tokenizer_file, eod_id, pad_id)
        self.eod_id = self.eos_id = self.bos_id = self.unk_id = self.bpe.eod
        self.pad_id = self.bpe.pad_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.bpe.vocab_size

    @property
    def vocab(self) -> list[str]:
        """Tokens by id."""
        return [self.bpe.tokenizer.id_to_token(i) for i in range(self.vocab_size)]

    def text_to_tokens(self, text: str) -> list[str]:
        """Tokens of a text."""
        return self.ids_to_tokens(self.text_to_ids(text))

    def tokens_to_text(self, tokens: list[str]) -> str:
        """Text of tokens."""
        return self.ids_to_text(self.tokens_to_ids(tokens))

    def tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Ids of tokens; end of text for one that does not exist."""
        ids = (self.bpe.tokenizer.token_to_id(t) for t in tokens)
        return [self.unk_id if i is None else i for i in ids]

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Tokens of ids."""
        return [self.bpe.tokenizer.id_to_token(int(i)) for i in ids]

    def text_to_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.bpe.encode(text)

    def ids_to_text(self, ids: list[int], remove_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.bpe.decode(ids, skip_special_tokens=remove_special_tokens)


io.track_io(ElasticTokenizer, artifacts=[FileArtifact("tokenizer_file")])


def load_tokenizer(path: str | None = None, end: str | None = None) -> ElasticTokenizer:
    """The tokenizer of a file, or the shipped one; `end`: the token that ends a text, where no file says it."""
    found = BPETokenizer(path or DEFAULT_TOKENIZER, end)
    return ElasticTokenizer(str(found.path), found.eod, found.pad_id)
