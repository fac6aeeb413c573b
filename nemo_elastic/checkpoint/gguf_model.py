"""A child as llama.cpp's `nemotron_h`: its keys, and its tensors under llama.cpp's names.

    blk.I.ssm_a = -exp(A_log)  [m, 1]        everything else is the child's own tensor, in another shape

Sizes of FFN and query heads may differ from layer to layer; a layer without MLP (attention) has 0 neurons (KV heads),
by which llama.cpp knows its kind. Matrices have the file's dtype; norms, convolution and the scan's own parameters are
always fp32, as llama.cpp's kernels want them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.model_fields import whole_model
from ..config.parent_hf import adapter_of_model
from ..huggingface import NEMOTRON_H, unsayable
from ..huggingface.scan import EPSILON
from ..kinds import dims, kind_of, kind_of_dim, kinds
from ..kinds.kind import Kind, PerLayer
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import Architecture
from ..space.layout import ParamLayout
from ..space.subnet import Subnet, layer_sizes
from .extract import per_layer_dims
from .huggingface import hf_tensors
from .reader import LazyTensor

ARCHITECTURE = "nemotron_h"
READER = "llama.cpp's nemotron_h"
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type
OUTER_NAMES = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OUTER_MATRICES = frozenset(["token_embd.weight", "output.weight"])
Change = Callable[[Tensor], Tensor]


def check_gguf(model: Mapping[str, Any], architecture: Architecture, subnet: Subnet) -> None:
    """Refuse a child that llama.cpp cannot say.

    Args:
        model: the parent's model section; `architecture` its sizes.

    Raises:
        ProblemsError: naming everything that it cannot.
    """
    if (family := adapter_of_model(model)) is not NEMOTRON_H:
        words = f"gguf is written of NemotronH's models, not of {family.words}'s; extract with --format hf, and give "
        words += "that folder to llama.cpp's own convert_hf_to_gguf.py (not tried here)"
        raise ProblemsError([Problem("--format", words)])
    found = unsayable(NEMOTRON_H, whole_model(model), READER)
    activation = model.get("activation_func", "squared_relu")
    if activation != "squared_relu":
        found.append(Problem("model.activation_func", f"{activation!r} cannot be said in {READER}: only squared_relu"))
    varied = per_layer_dims(architecture, subnet)
    for dim in (dim for dim in dims() if dim.gguf_key and dim.name in varied):
        sizes, kind = ", ".join(map(str, varied[dim.name])), kind_of_dim(dim.name).name
        words = f"this child has {sizes} in its {kind} layers; {READER} has one number for all ({dim.gguf_key}) and "
        words += "cannot say that; train with per_layer: false, or give --format hf --hf-schema per_layer_config"
        found.append(Problem(f"elastic.dims.{dim.name}.per_layer", words))
    found += [
        Problem("model.hybrid_override_pattern", f"{kind.letter!r} ({kind.words}) cannot be said in {READER}")
        for kind in kinds()
        if kind.gguf is None and kind.huggingface is not None and kind.letter in architecture.hybrid_override_pattern
    ]
    raise_if_any(found)


def gguf_keys(
    model: Mapping[str, Any], architecture: Architecture, subnet: Subnet, child: Architecture
) -> dict[str, int | float | bool | list[int]]:
    """Keys that say what a child computes, all written, whatever llama.cpp would take for one that lacks.

    Args:
        architecture: the parent's; `subnet` is cut from it.
        child: the child's own, with the largest of sizes that differ.
    """
    said = [kind for kind in reversed(kinds()) if kind.gguf]
    per_layer: dict[str, int | list[int]] = {}
    for kind in said:
        for entry in kind.gguf.per_layer:
            row = [_of_layer(kind, entry, architecture, subnet, layer, child) for layer in subnet.layers]
            per_layer[entry.key] = row if entry.list_always or len(set(row)) > 1 else row[0]
    one = {key: value for kind in said for key, value in kind.gguf.keys(child).items()}
    keys = {
        "vocab_size": child.vocab_size,
        "context_length": context_length(model),
        "embedding_length": child.hidden_size,
        "block_count": child.num_layers,
        **per_layer,
        "attention.layer_norm_rms_epsilon": EPSILON,  # of every norm, whatever the key is called
        "attention.layer_norm_epsilon": EPSILON,
        **one,
        "rope.scaling.finetuned": False,
    }
    return {f"{ARCHITECTURE}.{name}": value for name, value in keys.items()}


def _of_layer(
    kind: Kind, entry: PerLayer, architecture: Architecture, subnet: Subnet, layer: int, child: Architecture
) -> int:
    if architecture.hybrid_override_pattern[layer] == kind.letter:
        return layer_sizes(architecture, subnet, layer).get(entry.size, getattr(child, entry.size))
    return getattr(child, entry.size) if entry.elsewhere else 0


def context_length(model: Mapping[str, Any]) -> int:
    """Tokens that a file of this model section says it was trained with (no position is encoded: none is a limit)."""
    return int(model.get("seq_length") or 8192)


def gguf_tensors(tensors: Sequence[LazyTensor], layout: ParamLayout, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """A child's canonical `tensors` as llama.cpp's, matrices in `dtype`; none is read yet.

    Args:
        layout: the table of the child as a model of its own.
    """
    arch = layout.architecture
    for tensor in hf_tensors(list(tensors), layout, NEMOTRON_H):
        if tensor.name in OUTER_NAMES:
            name, last, said = OUTER_NAMES[tensor.name], OUTER_NAMES[tensor.name], None
        else:
            layer, suffix = tensor.name.removeprefix("backbone.layers.").split(".", 1)
            said = kind_of(arch.hybrid_override_pattern[int(layer)]).gguf
            last = said.names[suffix]
            name = f"blk.{layer}.{last}"
        kept = dtype if last in (OUTER_MATRICES if said is None else said.matrices) else torch.float32
        shape = tensor.shape if said is None else said.shape(last, tensor.shape, arch)
        change = None if said is None else said.values.get(last)
        yield LazyTensor(name, kept, shape, _Change(tensor, name, shape, kept, change))


class _Change:
    """Reads a tensor, and gives it llama.cpp's values, shape and dtype."""

    def __init__(
        self, tensor: LazyTensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, change: Change | None
    ) -> None:
        self._read: Callable[[], Tensor] = tensor.read
        self._name, self._shape, self._dtype, self._change = name, shape, dtype, change

    def __call__(self) -> Tensor:
        value = self._read()
        if self._change is not None:
            value = self._change(value)
        cast = value.to(self._dtype).reshape(self._shape).contiguous()
        if self._dtype == torch.float16 and not torch.isfinite(cast).all():
            words = f"has values beyond 65,504 ({float(value.abs().max()):.3g}), which float16 cannot say"
            raise ProblemsError([Problem("--dtype", f"{self._name} {words}; give bfloat16 or float32")])
        return cast
