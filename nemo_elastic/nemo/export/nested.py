"""The nested checkpoint: written whole or not at all, and opened with everything checked that is cheap to check.

    nested = weights/ (the parent under stock keys) + context/ + elastic/ (manifest, permutations, router)

NeMo is imported only to write the context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_elastic.checkpoint.atomic_folder import atomic_folder
from nemo_elastic.checkpoint.manifest import (
    FOLDER,
    PERMUTATIONS_FILE,
    ROUTER_FILE,
    Manifest,
    check_hashes,
    load_manifest,
    write_manifest,
)
from nemo_elastic.checkpoint.reader import (
    LazyTensor,
    MemoryReader,
    TensorReader,
    check_against_layout,
    lazy_tensors,
    told,
)
from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.checkpoint.tokenizer_files import TOKENIZER_FILE
from nemo_elastic.checkpoint.writer import write_safetensors_file
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.space.layout import ParamLayout


def write_nested(
    out: str | Path,
    weights: TensorReader | Mapping[str, Tensor],
    manifest: Manifest,
    *,
    tokenizer: str | Path | None = None,
    end_of_text: str | None = None,
    permutations: Mapping[str, Tensor] | None = None,
    router: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    heard: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a nested checkpoint.

    Args:
        weights: the trained full-size weights by canonical name.
        manifest: everything but `files`.
        tokenizer: a tokenizer.json or tokenizer folder; it travels in `context/`, with what lies beside it.
        end_of_text: the token that ends a text, where `tokenizer` does not say it.
        permutations: old unit at each new place, by `dim` or `dim.layer`.
        router: the router's state.
        dtype: cast the weights; None keeps each as it is.
        heard: told (tensors read, of how many) behind each.

    Raises:
        ProblemsError: `out` exists, the disk is full, or the weights are not those of `manifest.model`.
    """
    from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist
    from nemo_elastic.nemo.export.context import write_context

    reader = MemoryReader(dict(weights)) if isinstance(weights, Mapping) else weights
    layout = manifest.layout
    check_against_layout(reader, layout, "weights")
    tensors = told(lazy_tensors(reader, dtype), heard)
    with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in tensors)) as folder:
        written = write_torch_dist(folder / "weights", tensors, layout)
        hashes = {f"weights/{name}": digest for name, digest in written.items()}
        write_context(folder, manifest.model, tokenizer, dtype=main_dtype(tensors), end_of_text=end_of_text)
        (folder / FOLDER).mkdir()
        orders = {name: _narrow(order) for name, order in (permutations or {}).items()}
        for name, state in ((PERMUTATIONS_FILE, orders), (ROUTER_FILE, router)):
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
        return {name: order.to(torch.int64) for name, order in _state(self.path / PERMUTATIONS_FILE).items()}


def _narrow(order: Tensor) -> Tensor:
    """Orders are integers by the million for a large parent: two bytes each where that is enough."""
    return order.to(torch.int16 if order.numel() <= torch.iinfo(torch.int16).max else torch.int32)


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


def main_dtype(tensors: list[LazyTensor]) -> torch.dtype:
    """The dtype of most elements."""
    totals: dict[torch.dtype, int] = {}
    for tensor in tensors:
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
    return max(totals, key=totals.get)
