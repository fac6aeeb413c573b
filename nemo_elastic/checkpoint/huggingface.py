"""Hugging Face's NemotronH: names of tensors in both directions, and a reader of its folders, without `transformers`.

Names come from one table per kind of layer; all tensors are the same bytes on both sides except attention's fused
rows, which per query group are `[Q .. Q, K, V]` in Megatron and three tensors in Hugging Face.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architecture import ATTENTION, MAMBA, MLP, Architecture
from ..config.model_fields import architecture_of
from ..layout import ParamLayout
from ..problems import Problem, ProblemsError, raise_if_any
from .hf_config import model_from_hf
from .reader import LazyTensor, SafetensorsReader, TensorReader

PREFIXES = ("backbone.", "model.")
OUTER_NAMES = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
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

    Raises:
        ProblemsError: no such folder, another kind of model, or tensors that no row of the table has.
    """

    def __init__(self, folder: str | Path, architecture: Architecture | None = None) -> None:
        self.folder = Path(folder)
        file = self.folder / "config.json"
        if not file.is_file():
            raise ProblemsError([Problem(str(self.folder), "has no config.json: no Hugging Face model folder")])
        try:
            self.config: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise ProblemsError([Problem(str(file), f"is no JSON ({error})")]) from error
        self.model = model_from_hf(self.config)
        self._architecture = architecture_of(self.model)
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
        layout = ParamLayout(self._architecture, ffn_groups=1)
        self._sources: dict[str, tuple[str, ...]] = {}
        for name in layout.table:
            sources = tuple(on_disk.pop(theirs, "") for theirs in hf_names(layout, name))
            if all(sources):
                self._sources[name] = sources
        if self._architecture.share_embeddings_and_output_weights:
            on_disk.pop("lm_head.weight", None)
        lost = sorted(set(layout.table) - set(self._sources))
        found = [Problem(str(self.folder), f"lacks {', '.join(hf_names(layout, lost[0]))}")] if lost else []
        if on_disk:
            found.append(Problem(str(self.folder), f"has {min(on_disk)}, which config.json does not describe"))
        raise_if_any(found)

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


def _with_backbone(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    return name if prefix is None else "backbone." + name[len(prefix) :]
