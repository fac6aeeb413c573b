"""Whole checkpoints: parents in, the nested checkpoint, children out. NeMo itself is imported only to write a context.

    nested = weights/ (the parent under stock keys) + context/ + elastic/ (manifest, permutations, router)

Every folder is written beside its target and renamed when it is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_elastic.checkpoint.extract import child_architecture, plain_model
from nemo_elastic.checkpoint.hf_folder import write_hf_folder
from nemo_elastic.checkpoint.huggingface import HuggingFaceReader
from nemo_elastic.checkpoint.manifest import (
    FOLDER,
    PERMUTATIONS_FILE,
    ROUTER_FILE,
    Manifest,
    check_hashes,
    load_manifest,
    write_manifest,
)
from nemo_elastic.checkpoint.nemo_context import read_nemo_context
from nemo_elastic.checkpoint.reader import (
    LazyTensor,
    MemoryReader,
    SafetensorsReader,
    TensorReader,
    check_against_layout,
    lazy_tensors,
)
from nemo_elastic.checkpoint.schemas import plain_child
from nemo_elastic.checkpoint.tokenizer_files import TOKENIZER_FILE
from nemo_elastic.checkpoint.writer import atomic_folder, check_target, write_safetensors_file
from nemo_elastic.cost import parameters
from nemo_elastic.layout import ParamLayout
from nemo_elastic.mcore.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.parents import folder_of
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any
from nemo_elastic.space import Subnet

logger = logging.getLogger(__name__)
FORMATS = ("nemo", "hf")
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
        reader = TorchDistReader(folder)
        context = read_nemo_context(folder, reader.shape(_EMBEDDING)[0])
        return ParentDescription(context.model, context.tokenizer)
    if (folder / "config.json").is_file():
        return ParentDescription(HuggingFaceReader(folder).model, beside)
    return ParentDescription(None, beside)


def write_nested(
    out: str | Path,
    weights: TensorReader | Mapping[str, Tensor],
    manifest: Manifest,
    *,
    tokenizer: str | Path | None = None,
    permutations: Mapping[str, Tensor] | None = None,
    router: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write a nested checkpoint.

    Args:
        weights: the trained full-size weights by canonical name.
        manifest: everything but `files`.
        tokenizer: a tokenizer.json or tokenizer folder; it travels in `context/`.
        permutations: old unit at each new place, by `dim` or `dim.layer`.
        router: the router's state.
        dtype: cast the weights; None keeps each as it is.

    Raises:
        ProblemsError: `out` exists, the disk is full, or the weights are not those of `manifest.model`.
    """
    from nemo_elastic.mcore.dist_save import write_torch_dist
    from nemo_elastic.nemo.context import write_context

    reader = MemoryReader(dict(weights)) if isinstance(weights, Mapping) else weights
    layout = manifest.layout
    check_against_layout(reader, layout, "weights")
    tensors = list(lazy_tensors(reader, dtype))
    with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in tensors)) as folder:
        written = write_torch_dist(folder / "weights", tensors, layout)
        hashes = {f"weights/{name}": digest for name, digest in written.items()}
        write_context(folder, manifest.model, tokenizer, dtype=_main_dtype(tensors))
        (folder / FOLDER).mkdir()
        for name, state in ((PERMUTATIONS_FILE, permutations), (ROUTER_FILE, router)):
            if state:
                hashes[name] = write_safetensors_file(folder / name, list(lazy_tensors(MemoryReader(dict(state)))))
        write_manifest(folder, manifest, hashes)
    return Path(out)


@dataclass(frozen=True)
class Nested:
    """An opened nested checkpoint."""

    path: Path
    manifest: Manifest
    reader: TorchDistReader

    @property
    def layout(self) -> ParamLayout:
        """The table of its weights."""
        return self.manifest.layout

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer folder."""
        found = sorted((self.path / "context").rglob(TOKENIZER_FILE))
        return found[0].parent if found else None

    def router(self) -> dict[str, Tensor]:
        """The router's state ({} where none was written)."""
        return _state(self.path / ROUTER_FILE)

    def permutations(self) -> dict[str, Tensor]:
        """Old unit at each new place, by `dim` or `dim.layer`."""
        return _state(self.path / PERMUTATIONS_FILE)


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    reader = SafetensorsReader(path)
    return {name: reader.read(name) for name in reader.names()}


def open_nested(path: str | Path) -> Nested:
    """A nested checkpoint: manifest validated, files there and whole, weights of the manifest's model.

    Small files are hashed here; the `.distcp` files are covered by the CRC-32 of each record that is read (`verify`
    hashes them too).

    Raises:
        ProblemsError: what is wrong, by file or key.
    """
    path = Path(path)
    manifest = load_manifest(path)
    check_hashes(path, manifest, [n for n in manifest.files if not n.endswith(".distcp")])
    reader = TorchDistReader(path)
    check_against_layout(reader, manifest.layout, str(path / "weights"))
    return Nested(path, manifest, reader)


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
        format: `nemo` (plain `SSMConfig`) or `hf` (NemotronH folder).
        hf_schema: how a Hugging Face folder says sizes that differ per layer (`checkpoint.schemas`).
        dtype: cast to it; None keeps what is stored.

    Raises:
        ProblemsError: a damaged checkpoint, unknown budget, a child the format cannot say, or an `out` in the way.
    """
    if format not in FORMATS:
        raise ProblemsError([Problem("--format", f"{format!r} must be one of {', '.join(FORMATS)}")])
    check_target(out, force)
    opened = nested if isinstance(nested, Nested) else open_nested(nested)
    subnet = opened.manifest.subnet(budget)
    if format == "nemo":
        child_architecture(opened.layout.architecture, subnet)  # refuses what a plain config cannot say
    child = plain_child(opened.reader, opened.layout, subnet, schema=hf_schema, dtype=dtype)
    model = plain_model(opened.manifest.model, child.architecture)
    with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in child.tensors)) as folder:
        if format == "nemo":
            _write_nemo_child(folder, child.tensors, child.layout, model, opened.tokenizer)
        else:
            card = child_card(opened, budget, subnet)
            if child.padding:
                card["sizes"]["padding (zeros)"] = f"{child.padding:,} parameters"
                logger.warning("%s: %d zeros fill up layers that are smaller than others", budget, child.padding)
            write_hf_folder(
                folder,
                child.tensors,
                child.layout,
                model,
                tokenizer=opened.tokenizer,
                config=child.config,
                card=card,
            )
    logger.info("%s: child %s of %s, format %s", out, budget, opened.path, format)
    return Path(out)


def _write_nemo_child(
    folder: Path, tensors: list[LazyTensor], layout: ParamLayout, model: Mapping[str, Any], tokenizer: Path | None
) -> None:
    from nemo_elastic.mcore.dist_save import write_torch_dist
    from nemo_elastic.nemo.context import write_context

    write_torch_dist(folder / "weights", tensors, layout)
    write_context(folder, model, tokenizer, dtype=_main_dtype(tensors))


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
    targets, found = {name: Path(out) / name for name in opened.manifest.subnets}, []
    for name, target in targets.items():
        try:
            check_target(target, how.get("force", False))
            if how.get("format", "nemo") == "nemo":
                child_architecture(opened.layout.architecture, opened.manifest.subnet(name))
            else:
                schema = how.get("hf_schema", "uniform")
                plain_child(opened.reader, opened.layout, opened.manifest.subnet(name), schema=schema)
        except ProblemsError as error:
            found += [replace(p, message=f"{p.message} (budget {name})") for p in error.problems]
    raise_if_any(found)
    for done, (name, target) in enumerate(targets.items()):
        if progress:
            progress(name, done, len(targets))
        extract(opened, name, target, **how)
    return targets


def child_card(nested: Nested, budget: str, subnet: Subnet) -> dict[str, Any]:
    """What a model card says of a child."""
    layout = nested.layout
    count = parameters(layout, subnet)
    whole = sum(spec.numel({}) for spec in layout.table.values())
    return {
        "name": f"{nested.path.resolve().name} / {budget}",
        "parameters": count,
        "of_parent": count / whole,
        "sizes": {name: value for name, value in subnet.to_dict().items() if name != "layers"},
        "provenance": {
            "nested_checkpoint": nested.path.resolve().name,
            "budget": budget,
            "kept_layers": list(subnet.layers),
            **nested.manifest.provenance,
        },
    }


def _main_dtype(tensors: list[LazyTensor]) -> torch.dtype:
    """The dtype of most elements."""
    totals: dict[torch.dtype, int] = {}
    for tensor in tensors:
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
    return max(totals, key=totals.get)
