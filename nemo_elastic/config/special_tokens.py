"""Which ids a tokenizer has, and which of its tokens end a text and fill up a row: the parent's own files say so.

Looked for beside the tokenizer.json, in this order: `eos_token` of tokenizer_config.json and special_tokens_map.json,
`eos_token_id` of config.json and generation_config.json (the first of a list), then the name `<|endoftext|>`. Ids are
read from the file itself, as one may have holes: what counts for a model's rows is the largest id. No torch here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError

END_OF_TEXT, PAD = "<|endoftext|>", "<pad>"
NAMED = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERED = ("config.json", "generation_config.json")


def token_ids(file: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included (a unigram's vocabulary is a list of pairs).

    Raises:
        ProblemsError: keyed by the file, when it is none.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        vocab = data["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        ids |= {t["content"]: t["id"] for t in data.get("added_tokens") or []}
        if not ids or not all(isinstance(i, int) and i >= 0 for i in ids.values()):
            raise ValueError("its ids are no numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise ProblemsError([Problem(str(file), f"is no tokenizer.json ({reason})")]) from error
    return ids


def row_problems(file: Path, rows: int) -> list[Problem]:
    """A token whose id is beyond the rows of the embedding: it could not be looked up."""
    token, largest = max(token_ids(file).items(), key=lambda item: item[1])
    if largest < rows:
        return []
    words = f"{str(file)!r}: {token!r} has id {largest}, but model.vocab_size={rows} rows end at {rows - 1}; "
    return [Problem("data.tokenizer", words + "give the parent's own tokenizer")]


def end_of_text(file: Path, ids: Mapping[str, int], given: str | int | None = None) -> int:
    """The id that ends a text.

    Args:
        file: the tokenizer.json; what lies beside it is asked.
        ids: its tokens.
        given: `data.end_of_text`, stronger than any file; or an id.

    Raises:
        ProblemsError: nobody says which, or what is said is no token.
    """
    if given is not None:
        found = given if isinstance(given, int) else ids.get(given)
        if found not in ids.values():
            raise ProblemsError([Problem("data.end_of_text", f"{given!r} is no token of {str(file)!r}")])
        return found
    for place, said in _said(file.parent, "eos_token"):
        found = ids.get(said) if isinstance(said, str) else said
        if found in ids.values():
            return found
        words = f"{place} names {said!r} as end of text, which is no token of {file.name}; set data.end_of_text"
        raise ProblemsError([Problem("data.end_of_text", words)])
    if END_OF_TEXT in ids:
        return ids[END_OF_TEXT]
    words = f"is not set, no file beside {str(file)!r} says eos_token or eos_token_id, and it has no {END_OF_TEXT}; "
    raise ProblemsError([Problem("data.end_of_text", words + "name the token that ends a text")])


def padding(file: Path, ids: Mapping[str, int], end: int) -> int:
    """The id that fills up a row: what the files say, `<pad>`, or end of text."""
    for _, said in _said(file.parent, "pad_token"):
        found = ids.get(said) if isinstance(said, str) else said
        if found in ids.values():
            return found
    return ids.get(PAD, end)


def token_name(value: Any) -> str | None:
    """A special token's text, which files give as a word or as a mapping with its `content`."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def id_of(value: Any) -> int | None:
    """An id, which files give as a number or as a list whose first counts."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_beside(folder: Path, name: str) -> Mapping[str, Any]:
    """A JSON file of a tokenizer's folder; {} where it is missing.

    Raises:
        ProblemsError: it is no JSON mapping.
    """
    file = folder / name
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes().decode("utf-8-sig"))
        if not isinstance(data, Mapping):
            raise ValueError(f"{str(data)[:40]!r} must be a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ProblemsError([Problem(str(file), f"cannot be read as JSON ({str(error)[:120]})")]) from error
    return data


def _said(folder: Path, kind: str) -> Iterator[tuple[Path, str | int]]:
    """(file, token or id) of everything that says a special token."""
    for name in NAMED:
        if (token := token_name(read_beside(folder, name).get(kind))) is not None:
            yield folder / name, token
    for name in NUMBERED:
        if (number := id_of(read_beside(folder, name).get(f"{kind}_id"))) is not None:
            yield folder / name, number
