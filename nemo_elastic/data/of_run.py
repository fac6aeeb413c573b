"""The text of a configured run: its tokenizer, what ends a text, and whether all of it can be read."""

from __future__ import annotations

from pathlib import Path

from ..config.parent_files import BUILTIN, folder_of
from ..config.parent_nemo import read_nemo_context
from ..config.sections import RunConfig
from ..config.special_tokens import row_problems
from ..problems import Problem, ProblemsError, raise_if_any
from .entries import entry_problems
from .sources import open_windows, without_padding
from .tokenizer import DEFAULT_TOKENIZER, TOKENIZER_FILE, BPETokenizer


def tokenizer_of(run: RunConfig) -> str | None:
    """The tokenizer.json of `data.tokenizer`, or the parent's own; None means the one of the tiny parent.

    Raises:
        ProblemsError: a parent that brings no tokenizer, and none given.
    """
    if run.data.tokenizer is not None:
        given = Path(run.data.tokenizer)
        return str(given / TOKENIZER_FILE if given.is_dir() else given)
    if run.parent.path is None or run.parent.path.startswith(BUILTIN):
        return None
    found = _tokenizer_of_parent(folder_of(run.parent.path))
    if found is None:
        words = f"is not set, and the parent {run.parent.path!r} brings none; give a tokenizer.json"
        raise ProblemsError([Problem("data.tokenizer", words)])
    return str(found / TOKENIZER_FILE if found.is_dir() else found)


def _tokenizer_of_parent(folder: Path) -> Path | None:
    if (folder / "context").is_dir():
        return read_nemo_context(folder).tokenizer
    return folder if (folder / TOKENIZER_FILE).is_file() else None


def text_tokenizer(run: RunConfig) -> BPETokenizer:
    """The tokenizer of a run's text, with the end of text that `data.end_of_text` or the parent's files say.

    Raises:
        ProblemsError: there is none, it cannot be read, or nobody says what ends a text.
    """
    try:
        return BPETokenizer(tokenizer_of(run) or DEFAULT_TOKENIZER, run.data.end_of_text)
    except ProblemsError:
        raise
    except ValueError as error:
        raise ProblemsError([Problem("data.tokenizer", str(error).removeprefix("data.tokenizer="))]) from error


def end_of_text_name(run: RunConfig) -> str:
    """The token that ends a text of this run."""
    tokenizer = text_tokenizer(run)
    return tokenizer.tokenizer.id_to_token(tokenizer.eod)


def tokenizer_source(run: RunConfig) -> Path:
    """What travels with every checkpoint of a run: the folder of its tokenizer.json, or the file if it is alone."""
    file = Path(tokenizer_of(run) or DEFAULT_TOKENIZER)
    alone = file.name != TOKENIZER_FILE or file == DEFAULT_TOKENIZER  # beside that one lies a model section
    return file if alone else file.parent


def check_text(run: RunConfig, *, trains: bool = True) -> None:
    """The run's text and tokenizer, before anything is started or written. Text that is not in the cache is tokenized.

    Args:
        trains: the text of all stages is read, and what is held out; otherwise only what ranking reads.

    Raises:
        ProblemsError: a tokenizer or a text that is not there or cannot be read, too little of it, an id that the
            parent has no row for, or nobody says what ends a text.
    """
    file, rows = Path(tokenizer_of(run) or DEFAULT_TOKENIZER), int(run.model["vocab_size"])
    raise_if_any([*entry_problems(run.data), *(row_problems(file, rows) if file.is_file() else ())])
    tokenizer = text_tokenizer(run)
    lengths = [stage.seq_length for stage in run.train.stages] if trains else []
    data = run.data
    heldout = [("heldout", length, data.chat) for length in lengths[-1:]]
    ranked = ("train", run.rank.seq_length, without_padding(data.chat))
    for split, length, chat in dict.fromkeys([ranked, *(("train", n, data.chat) for n in lengths), *heldout]):
        open_windows(
            split, tokenizer, length, blend=data.blend, chat=chat, paths=data.paths, vocab_size=rows,
            shuffle=split == "train", cache_dir=data.cache_dir,
        )  # fmt: skip
