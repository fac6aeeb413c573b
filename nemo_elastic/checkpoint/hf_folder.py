"""A child as a Hugging Face folder: config, safetensors, tokenizer, generation config and model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.parent_hf import adapter_of_model
from ..huggingface import Adapter
from ..space.layout import ParamLayout
from .hf_config import hf_config
from .huggingface import hf_tensors
from .reader import LazyTensor
from .tokenizer_files import GENERATION, write_tokenizer
from .writer import SHARD_BYTES, write_safetensors


def write_hf_folder(
    folder: Path,
    tensors: Sequence[LazyTensor],
    layout: ParamLayout,
    model: Mapping[str, Any],
    *,
    tokenizer: str | Path | None,
    card: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    adapter: Adapter | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Fill the existing empty `folder`.

    Args:
        tensors: the child's, by canonical name, described by `layout`.
        model: its plain model section.
        tokenizer: a tokenizer folder or tokenizer.json.
        config: keys of config.json that say per-layer sizes (`schemas.PlainChild.config`).
        adapter: the family it is written as; None: that of `model`.
        card: `name`, `parameters`, `of_parent` (fraction), `sizes`, `provenance` for README.md.

    Returns:
        file name -> SHA-256 of the weights' files.
    """
    adapter = adapter or adapter_of_model(model)
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {k: v for k, v in write_tokenizer(folder, tokenizer).items() if k != "tokens" and v is not None}
    _json(folder / "config.json", {**hf_config(model, tensors[0].dtype, ids, adapter), **(config or {})})
    if not (folder / GENERATION).is_file():  # else it is the parent's own
        _json(folder / GENERATION, {"_from_model_config": True, **ids})
    (folder / "README.md").write_text(model_card(card, model, adapter))
    return write_safetensors(folder, list(hf_tensors(list(tensors), layout, adapter)), shard_bytes=shard_bytes)


def model_card(card: Mapping[str, Any], model: Mapping[str, Any], adapter: Adapter) -> str:
    """README.md with sizes and provenance."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(adapter.tags)}, nemo-elastic]",
        "---",
        f"# {card['name']}",
        "",
        f"A child of {card['parameters']:,} parameters ({100 * card['of_parent']:.1f} % of its parent), read out of a "
        "nested checkpoint of nemo-elastic without further training.",
        "",
        "| size | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in card["sizes"].items()),
        f"| hybrid_override_pattern | `{model['hybrid_override_pattern']}` |",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained('.')",
        "```",
        "",
        "How it was made:",
        "",
        "```json",
        json.dumps(card["provenance"], indent=2, default=str),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
