"""A tokenizer as the folder of files that Hugging Face's `AutoTokenizer` (and NeMo's, which wraps it) reads.

Given one `tokenizer.json`, the small companion files are written from its special tokens; given a folder, its own
companion files are copied byte by byte, but for what names code to run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError

TOKENIZER_FILE = "tokenizer.json"
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")


def write_tokenizer(folder: Path, source: str | Path) -> dict[str, Any]:
    """Fill `folder` from a tokenizer folder or a `tokenizer.json`.

    Returns:
        `bos_token_id`, `eos_token_id`, `pad_token_id` (None where there is none) and `vocab_size`.

    Raises:
        ProblemsError: there is no tokenizer at `source`, or it is no JSON.
    """
    source = Path(source)
    file = source / TOKENIZER_FILE if source.is_dir() else source
    if not file.is_file():
        words = f"has no {TOKENIZER_FILE}; set data.tokenizer to a tokenizer.json or a Hugging Face tokenizer folder"
        raise ProblemsError([Problem(str(source), words)])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / TOKENIZER_FILE)
    for name in COMPANIONS if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    try:
        ids = token_ids(folder / TOKENIZER_FILE)
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemsError([Problem(str(file), f"is no tokenizer.json ({error!r})")]) from error
    config = folder / "tokenizer_config.json"
    _without_code(config)
    if not config.is_file():
        names = _default_names(ids)
        config.write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **_present(names)}, indent=2) + "\n"
        )
        (folder / "special_tokens_map.json").write_text(json.dumps(_present(names), indent=2) + "\n")
    return {**special_token_ids(folder), "vocab_size": max(ids.values()) + 1}


def special_token_ids(folder: Path) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a tokenizer folder; None where there is none."""
    ids, config = token_ids(folder / TOKENIZER_FILE), folder / "tokenizer_config.json"
    names = _special_names(config) if config.is_file() else _default_names(ids)
    return {f"{kind}_id": ids.get(names.get(kind) or "") for kind in ("bos_token", "eos_token", "pad_token")}


def token_ids(file: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included (a unigram's vocabulary is a list of pairs)."""
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    return {**ids, **{t["content"]: t["id"] for t in data.get("added_tokens", [])}}


def _without_code(config: Path) -> None:
    """Drop what names Python code of the folder or of a hub (`auto_map`), and the class that it would have been."""
    data = json.loads(config.read_text()) if config.is_file() else {}
    if "auto_map" in data:
        kept = {name: value for name, value in data.items() if name != "auto_map"}
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # tokenizer.json says what it does
        config.write_text(json.dumps(kept, indent=2) + "\n")


def _default_names(ids: dict[str, int]) -> dict[str, str | None]:
    end = next((n for n in END_OF_TEXT_NAMES if n in ids), None)
    pad = next((n for n in PAD_NAMES if n in ids), end)
    return {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": pad}


def _special_names(config: Path) -> dict[str, str | None]:
    data = json.loads(config.read_text())

    def content(value: Any) -> str | None:
        return value.get("content") if isinstance(value, dict) else value

    return {kind: content(data.get(kind)) for kind in ("bos_token", "eos_token", "unk_token", "pad_token")}


def _present(names: dict[str, str | None]) -> dict[str, str]:
    return {kind: name for kind, name in names.items() if name}
