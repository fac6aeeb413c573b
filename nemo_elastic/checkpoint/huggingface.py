"""Hugging Face's NemotronH: names of tensors in both directions, and a reader of its folders, without `transformers`.

Names come from the layer kinds; all tensors are the same bytes on both sides except fused rows (`kinds.Packed`):
attention's are per query group `[Q .. Q, K, V]` in Megatron and three tensors in Hugging Face.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.model_fields import architecture_of
from ..config.parent_files import read_json
from ..config.parent_hf import model_from_hf
from ..kinds import kind_of
from ..kinds.kind import Packed
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import Architecture
from ..space.layout import ParamLayout
from .reader import LazyTensor, TensorReader
from .safetensors_reader import SafetensorsReader

PREFIXES = ("backbone.", "model.")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "lm_head.weight"
OUTER_NAMES = {
    EMBEDDING: "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": HEAD,
}


def hf_names(layout: ParamLayout, name: str) -> tuple[str, ...]:
    """Names on disk of one canonical tensor (several for a packed one)."""
    spec = layout.table[name]
    if spec.layer is None:
        return (OUTER_NAMES[name],)
    suffix = name.split(".", 3)[3]
    return tuple(f"backbone.layers.{spec.layer}.{new}" for new in kind_of(spec.kind).huggingface.names[suffix])


def packing(layout: ParamLayout, name: str) -> Packed | None:
    """How one canonical tensor is split; None where it is stored whole."""
    spec = layout.table[name]
    return None if spec.layer is None else kind_of(spec.kind).huggingface.packed.get(name.split(".", 3)[3])


def split_packed(tensor: Tensor, packed: Packed, count: int, architecture: Architecture) -> tuple[Tensor, ...]:
    """`[groups x (rest + 1 + 1 ..) x d, h]` to `count` tensors `[rest d, h]`, `[groups d, h]`, ..."""
    groups, d = (getattr(architecture, size) for size in (packed.groups, packed.channels))
    grid = tensor.view(groups, -1, d, tensor.shape[1])
    single = range(grid.shape[1] - count + 1, grid.shape[1])
    return tuple(part.reshape(-1, tensor.shape[1]) for part in (grid[:, : single.start], *(grid[:, i] for i in single)))


def merge_packed(parts: Sequence[Tensor], packed: Packed, architecture: Architecture) -> Tensor:
    """Inverse of `split_packed`."""
    groups, d = (getattr(architecture, size) for size in (packed.groups, packed.channels))
    width = parts[0].shape[1]
    return torch.cat([part.reshape(groups, -1, d, width) for part in parts], dim=1).reshape(-1, width)


def hf_tensors(tensors: list[LazyTensor], layout: ParamLayout) -> Iterator[LazyTensor]:
    """The tensors of a plain model, described by its own `layout`, under Hugging Face's names."""
    arch = layout.architecture
    for tensor in tensors:
        names, packed = hf_names(layout, tensor.name), packing(layout, tensor.name)
        if packed is None:
            yield LazyTensor(names[0], tensor.dtype, tensor.shape, tensor.read)
            continue
        single = getattr(arch, packed.groups) * getattr(arch, packed.channels)
        rows = [tensor.shape[0] - (len(names) - 1) * single, *(single for _ in names[1:])]
        split = _SplitOnce(tensor, packed, len(names), arch)
        for number, (name, count) in enumerate(zip(names, rows, strict=True)):
            yield LazyTensor(name, tensor.dtype, (count, tensor.shape[1]), lambda n=number, split=split: split.part(n))


class _SplitOnce:
    """Reads the fused tensor at the first part and drops it with the last."""

    def __init__(self, tensor: LazyTensor, packed: Packed, count: int, architecture: Architecture) -> None:
        self._tensor, self._packed, self._count, self._architecture = tensor, packed, count, architecture
        self._parts: tuple[Tensor, ...] | None = None

    def part(self, number: int) -> Tensor:
        parts = self._parts or split_packed(self._tensor.read(), self._packed, self._count, self._architecture)
        self._parts = None if number == self._count - 1 else parts
        return parts[number]


class HuggingFaceReader:
    """`TensorReader` over a NemotronH folder (config.json and safetensors), by canonical names.

    Args:
        folder: where it is; nothing is looked up on the hub.
        architecture: what the run's `model` section says; refused where config.json says otherwise.
        output_weights: of a tied parent that stores another `lm_head.weight` than its embedding: which one counts,
            `embedding` or (for an untied `architecture`) `lm_head`.

    Raises:
        ProblemsError: no such folder, another kind of model, or tensors that no row of the table has.
    """

    def __init__(
        self, folder: str | Path, architecture: Architecture | None = None, output_weights: str | None = None
    ) -> None:
        self.folder = Path(folder)
        file = self.folder / "config.json"
        if not file.is_file():
            raise ProblemsError([Problem(str(self.folder), "has no config.json: no Hugging Face model folder")])
        self.config: Mapping[str, Any] = read_json(file)
        self.model = model_from_hf(self.config, file)
        self._architecture = architecture_of(self.model)
        if self._architecture.share_embeddings_and_output_weights and output_weights == "lm_head":
            self._architecture = replace(self._architecture, share_embeddings_and_output_weights=False)
        if architecture is not None:
            raise_if_any(
                Problem(f"model.{name}", f"{wanted} is not what {file} has, {value}; use the parent's own")
                for (name, wanted), value in zip(
                    vars(architecture).items(), vars(self._architecture).values(), strict=True
                )
                if wanted != value
            )
        self._raw: TensorReader = SafetensorsReader(self.folder)
        on_disk = {_with_backbone(name): name for name in self._raw.names()}
        raise_if_any(_quantized(self.folder, self._raw))
        self._layout = layout = ParamLayout(self._architecture, ffn_groups=1)
        self._sources: dict[str, tuple[str, ...]] = {}
        for name in layout.table:
            sources = tuple(on_disk.pop(theirs, "") for theirs in hf_names(layout, name))
            if all(sources):
                self._sources[name] = sources
        lost = sorted(set(layout.table) - set(self._sources))
        found = [Problem(str(self.folder), f"lacks {', '.join(hf_names(layout, lost[0]))}")] if lost else []
        own_head = on_disk.pop(HEAD, None) if self._architecture.share_embeddings_and_output_weights else None
        if own_head is not None and output_weights is None and not lost:
            found += self._untied(own_head)
        if on_disk:
            found.append(Problem(str(self.folder), f"has {min(on_disk)}, which config.json does not describe"))
        raise_if_any(found)

    def _untied(self, head: str) -> list[Problem]:
        """A tied model may store the one matrix twice, if it is the same."""
        (embedding,) = self._sources[EMBEDDING]
        if torch.equal(self._raw.read(head), self._raw.read(embedding)):
            return []
        words = (
            f"tie_word_embeddings is true, but {head} is not {embedding}; say which one counts: "
            "parent.output_weights=embedding (as transformers does) or parent.output_weights=lm_head (an untied model)"
        )
        return [Problem(str(self.folder), words)]

    def names(self) -> list[str]:
        """Canonical names, in the order of the forward."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape (rows of q, k and v together)."""
        first, *rest = (self._raw.shape(source) for source in self._sources[name])
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype on disk."""
        return self._raw.dtype(self._sources[name][0])

    def read(self, name: str) -> Tensor:
        """The tensor; parts of a packed one are interleaved by group."""
        parts, packed = [self._raw.read(source) for source in self._sources[name]], packing(self._layout, name)
        return parts[0] if packed is None else merge_packed(parts, packed, self._architecture)


def _quantized(folder: Path, reader: TensorReader) -> list[Problem]:
    """8-bit and 4-bit weights come with scales, or as bytes."""
    for name in reader.names():
        dtype = reader.dtype(name)
        if name.endswith(("_scale", "_scale_inv", "_scale_2")) or dtype.itemsize < 2:
            kind = str(dtype).removeprefix("torch.")
            words = f"has {name} ({kind}): quantized weights cannot be trained; give the bf16 folder"
            return [Problem(str(folder), words)]
    return []


def _with_backbone(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    return name if prefix is None else "backbone." + name[len(prefix) :]
