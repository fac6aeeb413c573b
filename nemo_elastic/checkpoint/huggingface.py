"""Hugging Face's NemotronH: names of tensors in both directions, and a reader of its folders, without `transformers`.

Names come from one table per kind of layer; all tensors are the same bytes on both sides except attention's fused
rows, which per query group are `[Q .. Q, K, V]` in Megatron and three tensors in Hugging Face.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architecture import ATTENTION, MAMBA, MLP, Architecture
from ..config.model_fields import architecture_of
from ..config.parent_files import read_json
from ..config.parent_hf import model_from_hf
from ..layout import ParamLayout
from ..problems import Problem, ProblemsError, raise_if_any
from .reader import LazyTensor, SafetensorsReader, TensorReader

PREFIXES = ("backbone.", "model.")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "lm_head.weight"
OUTER_NAMES = {
    EMBEDDING: "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": HEAD,
}
LAYER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    MAMBA: {
        "norm.weight": ("norm.weight",),
        "mixer.in_proj.weight": ("mixer.in_proj.weight",),
        "mixer.conv1d.weight": ("mixer.conv1d.weight",),
        "mixer.conv1d.bias": ("mixer.conv1d.bias",),
        "mixer.dt_bias": ("mixer.dt_bias",),
        "mixer.A_log": ("mixer.A_log",),
        "mixer.D": ("mixer.D",),
        "mixer.norm.weight": ("mixer.norm.weight",),
        "mixer.out_proj.weight": ("mixer.out_proj.weight",),
    },
    ATTENTION: {
        "input_layernorm.weight": ("norm.weight",),
        "self_attention.linear_qkv.weight": ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
        "self_attention.linear_proj.weight": ("mixer.o_proj.weight",),
    },
    MLP: {
        "pre_mlp_layernorm.weight": ("norm.weight",),
        "mlp.linear_fc1.weight": ("mixer.up_proj.weight",),
        "mlp.linear_fc2.weight": ("mixer.down_proj.weight",),
    },
}


def hf_names(layout: ParamLayout, name: str) -> tuple[str, ...]:
    """Names on disk of one canonical tensor (three for attention's fused rows)."""
    spec = layout.table[name]
    if spec.layer is None:
        return (OUTER_NAMES[name],)
    suffix = name.split(".", 3)[3]
    return tuple(f"backbone.layers.{spec.layer}.{new}" for new in LAYER_NAMES[spec.kind][suffix])


def split_qkv(qkv: Tensor, architecture: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's `[groups x (Q.. + K + V) x d, h]` to `[q d, h]`, `[kv d, h]`, `[kv d, h]`; q is the tensor's own."""
    grid = qkv.view(architecture.num_query_groups, -1, architecture.kv_channels, qkv.shape[1])
    return tuple(part.reshape(-1, qkv.shape[1]) for part in (grid[:, :-2], grid[:, -2], grid[:, -1]))


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, architecture: Architecture) -> Tensor:
    """Inverse of `split_qkv`."""
    groups, d = architecture.num_query_groups, architecture.kv_channels
    grid = [part.reshape(groups, -1, d, q.shape[1]) for part in (q, k, v)]
    return torch.cat(grid, dim=1).reshape(-1, q.shape[1])


def hf_tensors(tensors: list[LazyTensor], layout: ParamLayout) -> Iterator[LazyTensor]:
    """The tensors of a plain model, described by its own `layout`, under Hugging Face's names."""
    arch = layout.architecture
    for tensor in tensors:
        names = hf_names(layout, tensor.name)
        if len(names) == 1:
            yield LazyTensor(names[0], tensor.dtype, tensor.shape, tensor.read)
            continue
        keys = arch.num_query_groups * arch.kv_channels
        rows = tensor.shape[0] - 2 * keys, keys, keys
        split = _SplitOnce(tensor, arch)
        for number, (name, count) in enumerate(zip(names, rows, strict=True)):
            yield LazyTensor(name, tensor.dtype, (count, tensor.shape[1]), lambda n=number, split=split: split.part(n))


class _SplitOnce:
    """Reads the fused tensor at the first part and drops it with the last."""

    def __init__(self, tensor: LazyTensor, architecture: Architecture) -> None:
        self._tensor, self._architecture = tensor, architecture
        self._parts: tuple[Tensor, ...] | None = None

    def part(self, number: int) -> Tensor:
        parts = self._parts or split_qkv(self._tensor.read(), self._architecture)
        self._parts = None if number == 2 else parts
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
        layout = ParamLayout(self._architecture, ffn_groups=1)
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
        """The tensor; q, k and v are interleaved by query group."""
        parts = [self._raw.read(source) for source in self._sources[name]]
        return parts[0] if len(parts) == 1 else merge_qkv(*parts, self._architecture)


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
