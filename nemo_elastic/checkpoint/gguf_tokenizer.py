"""A byte-level BPE `tokenizer.json` as the keys of a GGUF file.

llama.cpp has no pre-tokenizer in its files, only the name of one that it knows; `PRE_TOKENIZERS` says which of them
splits as a given `pre_tokenizer` does. Any other tokenizer is refused: llama.cpp would cut text into other tokens.
"""

import json
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from .tokenizer_files import TOKENIZER_FILE, special_token_ids

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of `pre_tokenizer`, as `_steps` writes them -> llama.cpp's name.
PRE_TOKENIZERS = {
    ("bytes+gpt2",): "gpt-2",
    ("digits", "bytes+gpt2"): "smollm",
    (f"split {_TEKKEN}", "bytes"): "tekken",
}


def tokenizer_keys(folder: Path, rows: int) -> dict[str, Any]:
    """Keys `tokenizer.*` of a tokenizer folder.

    Args:
        rows: of the embedding; ids without a token are filled up to it.

    Raises:
        ProblemsError: a tokenizer that llama.cpp would not run as it is.
    """
    file = folder / TOKENIZER_FILE
    data = json.loads(file.read_text())
    pre = _pre_tokenizer(file, data)
    tokens, kinds = [f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    added = {t["id"]: t for t in data.get("added_tokens", [])}
    for token, number in {**data["model"]["vocab"], **{t["content"]: i for i, t in added.items()}}.items():
        if number >= rows:
            words = f"has token {token!r} with id {number}, beyond the {rows} rows of the embedding"
            raise ProblemsError([Problem(str(file), words)])
        tokens[number], kinds[number] = token, NORMAL
        if number in added:
            kinds[number] = CONTROL if added[number]["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    ids = special_token_ids(folder)
    if ids["eos_token_id"] is None:  # llama.cpp would take its own default, a token of another meaning
        words = "says no token that ends a text; set eos_token in the tokenizer_config.json beside it"
        raise ProblemsError([Problem(str(file), words)])
    before, after = _added_by_encoding(file, ids)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        **{
            f"{key}_token_id": ids[f"{name}_token_id"]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
        "add_bos_token": before,
        "add_eos_token": after,
    }
    found = {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}
    template = _chat_template(folder)
    return found | ({"tokenizer.chat_template": template} if template else {})


def _pre_tokenizer(file: Path, data: dict[str, Any]) -> str:
    model = data["model"]
    found = []
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        found.append(
            f"its model is {model.get('type')}" + (" with byte_fallback" if model.get("byte_fallback") else "")
        )
    if not model.get("merges"):
        found.append("it has no merges")
    if data.get("normalizer"):
        found.append(f"it has a normalizer, {data['normalizer'].get('type')}")
    steps = _steps(data.get("pre_tokenizer"))
    if steps not in PRE_TOKENIZERS:
        found.append(f"its pre_tokenizer ({' then '.join(steps)[:200]}) is none of those known here")
    if found:
        words = f"cannot be said in a GGUF file: {'; '.join(found)}; use llama.cpp's own converter on --format hf"
        raise ProblemsError([Problem(str(file), words)])
    return PRE_TOKENIZERS[steps]


def _steps(step: Any) -> tuple[str, ...]:
    kind = (step or {}).get("type")
    if kind == "Sequence":
        return tuple(name for part in step["pretokenizers"] for name in _steps(part))
    if kind == "Digits":
        return ("digits",) if step["individual_digits"] else ("runs of digits",)
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return ("bytes+gpt2",) if step.get("use_regex", True) else ("bytes",)
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return (f"split {step['pattern']['Regex']}",)
    return (json.dumps(step),)


def _added_by_encoding(file: Path, ids: dict[str, int | None]) -> tuple[bool, bool]:
    """Whether encoding text puts the begin token before it, and the end token behind it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    text = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    before, after = whole == [ids["bos_token_id"], *text], whole == [*text, ids["eos_token_id"]]
    both = whole == [ids["bos_token_id"], *text, ids["eos_token_id"]]
    if not (before or after or both or whole == text):
        words = f"puts other tokens around a text ({whole}) than its begin and end; a GGUF file cannot say that"
        raise ProblemsError([Problem(str(file), words)])
    return before or both, after or both


def _chat_template(folder: Path) -> str | None:
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text()
    template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None
