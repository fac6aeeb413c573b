"""Checkpoints as folders: children out of a nested checkpoint, and what a parent's folder says of itself.

NeMo itself is imported only to write a context. Every folder is written beside its target and renamed when complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.checkpoint.atomic_folder import atomic_folder, check_target
from nemo_elastic.checkpoint.extract import child_architecture, plain_model
from nemo_elastic.checkpoint.gguf_file import GGUF_FILE, write_gguf
from nemo_elastic.checkpoint.gguf_model import check_gguf
from nemo_elastic.checkpoint.hf_config import check_hf
from nemo_elastic.checkpoint.hf_folder import write_hf_folder
from nemo_elastic.checkpoint.reader import LazyTensor
from nemo_elastic.checkpoint.schemas import PlainChild, plain_child
from nemo_elastic.checkpoint.tokenizer_files import TOKENIZER_FILE
from nemo_elastic.config.parent_files import folder_of, parent_files
from nemo_elastic.config.parent_hf import adapter_of_model
from nemo_elastic.config.parent_nemo import read_nemo_context
from nemo_elastic.cost.counts import parameters
from nemo_elastic.files import folder_problems
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.nemo.export.gguf_child import gguf_child
from nemo_elastic.nemo.export.nested import Nested, main_dtype, open_nested, write_nested
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

__all__ = ["Nested", "describe_parent", "extract", "extract_all", "open_nested", "write_nested"]

logger = logging.getLogger(__name__)
FORMATS = ("nemo", "hf", "gguf")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ParentDescription:
    """What a parent's folder says of itself: its model section and where its tokenizer lies (None: it does not say)."""

    model: Mapping[str, Any] | None
    tokenizer: Path | None


def describe_parent(path: str) -> ParentDescription:
    """The model section of a NeMo checkpoint (any TP x PP) or Hugging Face folder, without executing anything of it.

    Raises:
        ProblemsError: keyed `parent.path` or by the file that is wrong.
    """
    folder = folder_of(path)
    beside = folder if (folder / TOKENIZER_FILE).is_file() else None
    if (folder / "context").is_dir():
        rows = TorchDistReader(folder).shape(_EMBEDDING)[0]  # refuses what is no checkpoint in its own words
        context = read_nemo_context(folder)
        return ParentDescription({**context.model, "vocab_size": rows}, context.tokenizer)
    if (folder / "config.json").is_file():
        return ParentDescription(parent_files(path).model, beside)
    return ParentDescription(None, beside)


def extract(
    nested: str | Path | Nested,
    budget: str,
    out: str | Path,
    *,
    format: str = "nemo",
    hf_schema: str = "uniform",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Read one child out of a nested checkpoint.

    Args:
        budget: a name in the manifest.
        out: the child's folder.
        format: `nemo` (plain `SSMConfig`), `hf` (a folder of the parent's family) or `gguf` (one file for llama.cpp).
        hf_schema: how a Hugging Face folder says sizes that differ per layer (`checkpoint.schemas`).
        dtype: cast to it (float16: `gguf` only); None keeps what is stored.

    Raises:
        ProblemsError: a damaged checkpoint, unknown budget, a child the format cannot say, or an `out` in the way.
    """
    if format not in FORMATS:
        raise ProblemsError([Problem("--format", f"{format!r} must be one of {', '.join(FORMATS)}")])
    opened = nested if isinstance(nested, Nested) else open_nested(nested)
    check_target(out, force, opened.path)
    subnet = opened.manifest.subnet(budget)
    child = sayable_child(opened, subnet, format, hf_schema, dtype)
    if format == "gguf":
        written = gguf_child(opened, subnet, child, child_card(opened, budget, subnet), dtype)
        with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in written.tensors)) as folder:
            write_gguf(folder / GGUF_FILE, written.keys, written.tensors)
        logger.info("%s: child %s of %s, format gguf", out, budget, opened.path)
        return Path(out)
    model = plain_model(opened.manifest.model, child.architecture)
    with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in child.tensors)) as folder:
        if format == "nemo":
            _write_nemo_child(folder, child.tensors, child.layout, model, opened.tokenizer)
        else:
            if child.padding:
                logger.warning("%s: %d zeros fill up layers that are smaller than others", budget, child.padding)
            write_hf_folder(
                folder,
                child.tensors,
                child.layout,
                model,
                tokenizer=opened.tokenizer,
                config=child.config,
                adapter=adapter_of_model(opened.manifest.model),
                card=child_card(opened, budget, subnet, padding=child.padding),
            )
    logger.info("%s: child %s of %s, format %s", out, budget, opened.path, format)
    return Path(out)


def sayable_child(nested: Nested, subnet: Subnet, format: str, hf_schema: str, dtype: torch.dtype | None) -> PlainChild:
    """The child as `format` says it.

    Raises:
        ProblemsError: it cannot.
    """
    if dtype == torch.float16 and format != "gguf":
        raise ProblemsError([Problem("--dtype", "float16 is for --format gguf; give bfloat16 or float32")])
    if format == "nemo":
        child_architecture(nested.layout.architecture, subnet)  # refuses what a plain config cannot say
    elif format == "gguf":
        check_gguf(nested.manifest.model, nested.layout.architecture, subnet)
        return plain_child(nested.reader, nested.layout, subnet, schema="per_layer_config")
    child = plain_child(nested.reader, nested.layout, subnet, schema=hf_schema, dtype=dtype)
    if format == "hf":
        check_hf(nested.manifest.model, child)
    return child


def _write_nemo_child(
    folder: Path, tensors: list[LazyTensor], layout: ParamLayout, model: Mapping[str, Any], tokenizer: Path | None
) -> None:
    from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist
    from nemo_elastic.nemo.export.context import write_context

    write_torch_dist(folder / "weights", tensors, layout)
    write_context(folder, model, tokenizer, dtype=main_dtype(tensors))


def extract_all(
    nested: str | Path | Nested,
    out: str | Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **how: Any,
) -> dict[str, Path]:
    """`extract` for every budget, each to `out/<budget>`; all are checked before the first is written.

    Args:
        progress: called with (budget, done, total) before each.
        how: further arguments of `extract`.

    Raises:
        ProblemsError: all that `extract` would raise for any of them, at once.
    """
    opened = nested if isinstance(nested, Nested) else open_nested(nested)
    raise_if_any(folder_problems("--out", out))
    targets, found = {name: Path(out) / name for name in opened.manifest.subnets}, []
    for name, target in targets.items():
        try:
            check_target(target, how.get("force", False), opened.path)
            said = how.get("format", "nemo"), how.get("hf_schema", "uniform"), how.get("dtype")
            sayable_child(opened, opened.manifest.subnet(name), *said)
        except ProblemsError as error:
            found += [replace(p, message=f"{p.message} (budget {name})") for p in error.problems]
    raise_if_any(found)
    for done, (name, target) in enumerate(targets.items()):
        if progress:
            progress(name, done, len(targets))
        extract(opened, name, target, **how)
    return targets


def child_card(nested: Nested, budget: str, subnet: Subnet, *, padding: int = 0) -> dict[str, Any]:
    """What a model card says of a child; `padding`: zeros among its parameters."""
    layout = nested.layout
    count = parameters(layout, subnet)
    whole = sum(spec.numel({}) for spec in layout.table.values())
    return {
        "name": f"{nested.path.resolve().name} / {budget}",
        "parameters": count,
        "of_parent": count / whole,
        "sizes": {
            **{name: value for name, value in subnet.to_dict().items() if name != "layers"},
            **({"padding (zeros)": f"{padding:,} parameters"} if padding else {}),
        },
        "provenance": {
            "nested_checkpoint": nested.path.resolve().name,
            "budget": budget,
            "kept_layers": list(subnet.layers),
            **nested.manifest.provenance,
        },
    }
