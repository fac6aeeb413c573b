"""Hugging Face's names of tensors in both directions, and a reader of its folders, without `transformers`.

Names come from the adapter of a family; all tensors are the same bytes on both sides except fused rows: attention's are
per query group `[Q .. Q, K, V]` in Megatron and three tensors in Hugging Face (`kinds.Packed`), a gated MLP's are
`[gate; up]` and mostly two tensors (`huggingface.adapter.Stacked`); experts are one tensor `[E, f, h]` here, and mostly
one or two for each of them there (`Each`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.model_fields import architecture_of
from ..config.parent_files import read_json
from ..config.parent_hf import family_of_hf, left_out_note, model_from_hf
from ..huggingface import Adapter, Each, Stacked
from ..huggingface.adapter import EACH
from ..kinds.kind import Packed
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import Architecture
from ..space.blocks import DEPTH_UNITS
from ..space.layout import ParamLayout
from .reader import LazyTensor, TensorReader
from .safetensors_reader import SafetensorsReader

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
Packing = Packed | Stacked | Each
NAMED = 4  # that a problem lists


def hf_names(layout: ParamLayout, name: str, adapter: Adapter) -> tuple[str, ...]:
    """Names on disk of one canonical tensor: several for a packed one, unit by unit where each has its own."""
    found = hf_templates(layout, name, adapter)
    if EACH not in found[0]:
        return found
    return tuple(new.replace(EACH, str(unit)) for unit in range(layout.table[name].shape({})[0]) for new in found)


def hf_templates(layout: ParamLayout, name: str, adapter: Adapter) -> tuple[str, ...]:
    """The same with `EACH` for the number of a unit."""
    spec = layout.table[name]
    if spec.layer is None:
        return (adapter.outer[name],)
    place = spec.layer // DEPTH_UNITS[adapter.depth_unit]
    return tuple(f"{adapter.prefixes[0]}layers.{place}.{new}" for new in adapter.names[name.split(".", 3)[3]])


def packing(layout: ParamLayout, name: str, adapter: Adapter) -> Packing | None:
    """How one canonical tensor is split; None where it is stored whole."""
    if layout.table[name].layer is None:
        return None
    row = name.split(".", 3)[3]
    return Each(len(adapter.names[row])) if EACH in adapter.names[row][0] else adapter.packed.get(row)


def split_packed(tensor: Tensor, packed: Packing, count: int, architecture: Architecture) -> tuple[Tensor, ...]:
    """`[groups x (rest + 1 + 1 ..) x d, ..]` to `count` tensors `[rest d, ..]`, `[groups d, ..]`, ..; or equal ones."""
    if isinstance(packed, Each):
        return tuple(part for unit in tensor for part in unit.chunk(packed.parts))
    if isinstance(packed, Stacked):
        return tensor.chunk(count)
    groups, d = (getattr(architecture, size) for size in (packed.groups, packed.channels))
    rest = tensor.shape[1:]
    grid = tensor.view(groups, -1, d, *rest)
    single = range(grid.shape[1] - count + 1, grid.shape[1])
    return tuple(part.reshape(-1, *rest) for part in (grid[:, : single.start], *(grid[:, i] for i in single)))


def merge_packed(parts: Sequence[Tensor], packed: Packing, architecture: Architecture) -> Tensor:
    """Inverse of `split_packed`."""
    if isinstance(packed, Each):
        n = packed.parts
        return torch.stack([torch.cat(list(parts[i : i + n])) for i in range(0, len(parts), n)])
    if isinstance(packed, Stacked):
        return torch.cat(list(parts))
    groups, d = (getattr(architecture, size) for size in (packed.groups, packed.channels))
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, d, *rest) for part in parts], dim=1).reshape(-1, *rest)


def hf_tensors(tensors: list[LazyTensor], layout: ParamLayout, adapter: Adapter) -> Iterator[LazyTensor]:
    """The tensors of a plain model, described by its own `layout`, under Hugging Face's names."""
    arch = layout.architecture
    for tensor in tensors:
        names, packed = hf_names(layout, tensor.name, adapter), packing(layout, tensor.name, adapter)
        if packed is None:
            yield LazyTensor(names[0], tensor.dtype, tensor.shape, tensor.read)
            continue
        split = _SplitOnce(tensor, packed, len(names), arch)
        shapes = _shapes(tensor.shape, packed, len(names), arch)
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            yield LazyTensor(name, tensor.dtype, shape, lambda n=number, split=split: split.part(n))


def _shapes(whole: tuple[int, ...], packed: Packing, count: int, architecture: Architecture) -> list[tuple[int, ...]]:
    if isinstance(packed, Each):
        return [(whole[1] // packed.parts, *whole[2:])] * count
    if isinstance(packed, Stacked):
        return [(whole[0] // count, *whole[1:])] * count
    single = getattr(architecture, packed.groups) * getattr(architecture, packed.channels)
    return [(rows, *whole[1:]) for rows in (whole[0] - (count - 1) * single, *[single] * (count - 1))]


class _SplitOnce:
    """Reads the fused tensor at the first part and drops it with the last."""

    def __init__(self, tensor: LazyTensor, packed: Packing, count: int, architecture: Architecture) -> None:
        self._tensor, self._packed, self._count, self._architecture = tensor, packed, count, architecture
        self._parts: tuple[Tensor, ...] | None = None

    def part(self, number: int) -> Tensor:
        parts = self._parts or split_packed(self._tensor.read(), self._packed, self._count, self._architecture)
        self._parts = None if number == self._count - 1 else parts
        return parts[number]


class HuggingFaceReader:
    """`TensorReader` over a folder of any family (config.json and safetensors), by canonical names.

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
        self.adapter = adapter = family_of_hf(self.config, file)
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
        self._raw = SafetensorsReader(self.folder)
        on_disk = {self._written(name): name for name in self._raw.names() if not name.endswith(adapter.buffers)}
        if left_out_note(self.config, file):
            on_disk = {new: name for new, name in on_disk.items() if not new.startswith(adapter.left_out)}
        raise_if_any(_quantized(self.folder, self._raw))
        self._layout = layout = ParamLayout(self._architecture, ffn_groups=1)
        self._sources: dict[str, tuple[str, ...]] = {}
        lost: list[str] = []
        for name in layout.table:
            theirs = hf_names(layout, name, adapter)
            sources = tuple(on_disk.pop(one, "") for one in theirs)
            if all(sources):
                self._sources[name] = sources
            lost = lost or [one for one, source in zip(theirs, sources, strict=True) if not source]
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        found = [Problem(str(self.folder), f"lacks {', '.join(lost[:NAMED])}{more}")] if lost else []
        own_head = (
            on_disk.pop(adapter.outer[HEAD], None) if self._architecture.share_embeddings_and_output_weights else None
        )
        if own_head is not None and output_weights is None and not lost:
            found += self._untied(own_head)
        found += [] if lost else self._unlike()
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

    def _unlike(self) -> list[Problem]:
        """Units of one parameter that are stored one by one are alike."""
        for name, sources in self._sources.items():
            if not isinstance(packing(self._layout, name, self.adapter), Each):
                continue
            first, *others = ((self._raw.dtype(source), self._raw.shape(source)) for source in sources)
            for source, other in zip(sources[1:], others, strict=True):
                if other != first:
                    shown = [f"{str(dtype).removeprefix('torch.')} {list(shape)}" for dtype, shape in (other, first)]
                    words = (
                        f"has {source} as {shown[0]} and {sources[0]} as {shown[1]}: all experts of a layer are alike"
                    )
                    return [Problem(str(self.folder), words)]
        return []

    def _written(self, name: str) -> str:
        """A name on disk with the prefix that is written today."""
        today, *_ = prefixes = self.adapter.prefixes
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        return name if prefix is None else today + name[len(prefix) :]

    def names(self) -> list[str]:
        """Canonical names, in the order of the forward."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape (rows of q, k and v together; experts behind one another)."""
        packed = packing(self._layout, name, self.adapter)
        if isinstance(packed, Each):
            rows, *rest = self._raw.shape(self._sources[name][0])
            return (len(self._sources[name]) // packed.parts, packed.parts * rows, *rest)
        first, *rest = (self._raw.shape(source) for source in self._sources[name])
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype on disk."""
        return self._raw.dtype(self._sources[name][0])

    def read(self, name: str) -> Tensor:
        """The tensor; parts of a packed one are interleaved by group, or stacked. Experts are read where they go."""
        packed = packing(self._layout, name, self.adapter)
        if isinstance(packed, Each):
            whole = torch.empty(self.shape(name), dtype=self.dtype(name))
            windows = split_packed(whole, packed, len(self._sources[name]), self._architecture)
            for source, window in zip(self._sources[name], windows, strict=True):
                self._raw.read(source, window)
            return whole
        parts = [self._raw.read(source) for source in self._sources[name]]
        return parts[0] if packed is None or len(parts) == 1 else merge_packed(parts, packed, self._architecture)


def _quantized(folder: Path, reader: TensorReader) -> list[Problem]:
    """8-bit and 4-bit weights come with scales, or as bytes."""
    for name in reader.names():
        dtype = reader.dtype(name)
        if name.endswith(("_scale", "_scale_inv", "_scale_2")) or dtype.itemsize < 2:
            kind = str(dtype).removeprefix("torch.")
            words = f"has {name} ({kind}): quantized weights cannot be trained; give the bf16 folder"
            return [Problem(str(folder), words)]
    return []
