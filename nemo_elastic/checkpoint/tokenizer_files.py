"""A tokenizer as the folder of files that Hugging Face's `AutoTokenizer` (and NeMo's, which wraps it) reads.

Given one `tokenizer.json`, the small companion files are written from its special tokens; given a folder, its own
companion files are copied byte by byte, but for what names code to run or only one reader knows: chat template, special
tokens, generation settings. A folder without generation settings gets the ids that its config.json says.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ..config.special_tokens import id_of, read_beside, token_ids, token_name
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
    "chat_template.json",
    "generation_config.json",
)
GENERATION = "generation_config.json"
KINDS = ("bos_token", "eos_token", "pad_token")
END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")


def write_tokenizer(folder: Path, source: str | Path, end: str | None = None) -> dict[str, Any]:
    """Fill `folder` from a tokenizer folder or a `tokenizer.json`.

    Args:
        end: the token that ends a text, where `source` does not say it.

    Returns:
        `bos_token_id`, `eos_token_id`, `pad_token_id` (None where there is none) and how many `tokens` there are.

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
    ids = token_ids(folder / TOKENIZER_FILE)
    config = folder / "tokenizer_config.json"
    _readable_by_all(config)
    if not config.is_file():
        names = _default_names(ids, end)
        config.write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **_present(names)}, indent=2) + "\n"
        )
        (folder / "special_tokens_map.json").write_text(json.dumps(_present(names), indent=2) + "\n")
    said = {f"{kind}_id": value for kind in KINDS if (value := _config_id(source, kind)) is not None}
    if said and not (folder / GENERATION).is_file():
        (folder / GENERATION).write_text(json.dumps({"_from_model_config": True, **said}, indent=2) + "\n")
    return {**special_token_ids(folder), **said, "tokens": len(ids)}


def special_token_ids(folder: Path) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` that a tokenizer folder says; None where it says none."""
    ids, found = token_ids(folder / TOKENIZER_FILE), {}
    data, generation = read_beside(folder, "tokenizer_config.json"), read_beside(folder, GENERATION)
    for kind in KINDS:
        named = ids.get(token_name(data.get(kind)) or "")
        found[f"{kind}_id"] = id_of(generation.get(f"{kind}_id")) if named is None else named
    return found


def _config_id(source: Path, kind: str) -> Any:
    """What a model's own config.json says, a number or a list of them."""
    return read_beside(source, "config.json").get(f"{kind}_id") if source.is_dir() else None


def _readable_by_all(config: Path) -> None:
    """tokenizer_config.json without what only some readers understand, or what names code; else left byte by byte.

    `auto_map` names Python code of the folder or of a hub, and the class is one of it. transformers 5 writes a class
    that 4 (which NeMo has) does not know, and a list where 4 has a mapping. tokenizer.json says what a tokenizer does,
    whichever class reads it.
    """
    data = dict(read_beside(config.parent, config.name))
    foreign = "auto_map" in data or data.get("tokenizer_class") == "TokenizersBackend"
    listed = isinstance(data.get("extra_special_tokens"), list)
    if not foreign and not listed:
        return
    data.pop("auto_map", None)
    if foreign:
        data["tokenizer_class"] = "PreTrainedTokenizerFast"
    if listed:
        data["additional_special_tokens"] = data.pop("extra_special_tokens")
    config.write_text(json.dumps(data, indent=2) + "\n")


def _default_names(ids: dict[str, int], end: str | None) -> dict[str, str | None]:
    end = end or next((n for n in END_OF_TEXT_NAMES if n in ids), None)
    pad = next((n for n in PAD_NAMES if n in ids), end)
    return {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": pad}


def _present(names: dict[str, str | None]) -> dict[str, str]:
    return {kind: name for kind, name in names.items() if name}
