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

from ..architecture import ATTENTION, KIND_NAMES, MAMBA, MLP, Architecture
from ..config.parent_hf import EPSILON
from ..layout import ParamLayout
from ..problems import Problem, ProblemsError, raise_if_any
from ..space import Subnet, layer_sizes
from .extract import per_layer_dims
from .hf_config import only_problems
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
# By kind of layer: NemotronH's name -> llama.cpp's.
LAYER_NAMES = {
    MAMBA: {
        "norm.weight": "attn_norm.weight",
        "mixer.in_proj.weight": "ssm_in.weight",
        "mixer.conv1d.weight": "ssm_conv1d.weight",
        "mixer.conv1d.bias": "ssm_conv1d.bias",
        "mixer.dt_bias": "ssm_dt.bias",
        "mixer.A_log": "ssm_a",
        "mixer.D": "ssm_d",
        "mixer.norm.weight": "ssm_norm.weight",
        "mixer.out_proj.weight": "ssm_out.weight",
    },
    ATTENTION: {
        "norm.weight": "attn_norm.weight",
        "mixer.q_proj.weight": "attn_q.weight",
        "mixer.k_proj.weight": "attn_k.weight",
        "mixer.v_proj.weight": "attn_v.weight",
        "mixer.o_proj.weight": "attn_output.weight",
    },
    MLP: {
        "norm.weight": "attn_norm.weight",
        "mixer.up_proj.weight": "ffn_up.weight",
        "mixer.down_proj.weight": "ffn_down.weight",
    },
}
MATRICES = frozenset(
    [
        "token_embd.weight",
        "output.weight",
        "ssm_in.weight",
        "ssm_out.weight",
        "attn_q.weight",
        "attn_k.weight",
        "attn_v.weight",
        "attn_output.weight",
        "ffn_up.weight",
        "ffn_down.weight",
    ]
)


def check_gguf(model: Mapping[str, Any], architecture: Architecture, subnet: Subnet) -> None:
    """Refuse a child that llama.cpp cannot say.

    Args:
        model: the parent's model section; `architecture` its sizes.

    Raises:
        ProblemsError: naming everything that it cannot.
    """
    found = only_problems(model, READER)
    activation = model.get("activation_func", "squared_relu")
    if activation != "squared_relu":
        found.append(Problem("model.activation_func", f"{activation!r} cannot be said in {READER}: only squared_relu"))
    heads = per_layer_dims(architecture, subnet).get("mamba_num_heads")
    if heads:
        words = (
            f"this child has {', '.join(map(str, heads))} in its {KIND_NAMES[MAMBA]} layers; {READER} has one number "
        )
        words += "for all (ssm.time_step_rank) and cannot say that; train with per_layer: false, or give --format hf "
        found.append(Problem("elastic.dims.mamba_num_heads.per_layer", words + "--hf-schema per_layer_config"))
    raise_if_any(found)


def gguf_keys(
    model: Mapping[str, Any], architecture: Architecture, subnet: Subnet, child: Architecture
) -> dict[str, int | float | bool | list[int]]:
    """Keys that say what a child computes, all written, whatever llama.cpp would take for one that lacks.

    Args:
        architecture: the parent's; `subnet` is cut from it.
        child: the child's own, with the largest of sizes that differ.
    """
    ffn, heads, groups = [], [], []
    for layer in subnet.layers:
        kind, sizes = architecture.hybrid_override_pattern[layer], layer_sizes(architecture, subnet, layer)
        ffn.append(sizes["ffn_hidden_size"] if kind == MLP else 0)
        groups.append(child.num_query_groups if kind == ATTENTION else 0)
        # Never 0: llama.cpp divides by the first layer's, whatever its kind.
        heads.append(sizes["num_attention_heads"] if kind == ATTENTION else child.num_attention_heads)
    keys = {
        "vocab_size": child.vocab_size,
        "context_length": context_length(model),
        "embedding_length": child.hidden_size,
        "block_count": child.num_layers,
        "feed_forward_length": ffn,
        "attention.head_count": heads if len(set(heads)) > 1 else heads[0],
        "attention.head_count_kv": groups,
        "attention.key_length": child.kv_channels,
        "attention.value_length": child.kv_channels,
        "attention.layer_norm_rms_epsilon": EPSILON,
        "attention.layer_norm_epsilon": EPSILON,
        "ssm.conv_kernel": child.mamba_conv_kernel,
        "ssm.inner_size": child.mamba_num_heads * child.mamba_head_dim,
        "ssm.state_size": child.mamba_state_dim,
        "ssm.time_step_rank": child.mamba_num_heads,
        "ssm.group_count": child.mamba_num_groups,
        "rope.scaling.finetuned": False,
    }
    return {f"{ARCHITECTURE}.{name}": value for name, value in keys.items()}


def context_length(model: Mapping[str, Any]) -> int:
    """Tokens that a file of this model section says it was trained with (no position is encoded: none is a limit)."""
    return int(model.get("seq_length") or 8192)


def gguf_tensors(tensors: Sequence[LazyTensor], layout: ParamLayout, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """A child's canonical `tensors` as llama.cpp's, matrices in `dtype`; none is read yet.

    Args:
        layout: the table of the child as a model of its own.
    """
    arch = layout.architecture
    for tensor in hf_tensors(list(tensors), layout):
        if tensor.name in OUTER_NAMES:
            name, last = OUTER_NAMES[tensor.name], OUTER_NAMES[tensor.name]
        else:
            layer, suffix = tensor.name.removeprefix("backbone.layers.").split(".", 1)
            last = LAYER_NAMES[arch.hybrid_override_pattern[int(layer)]][suffix]
            name = f"blk.{layer}.{last}"
        kept = dtype if last in MATRICES else torch.float32
        yield LazyTensor(name, kept, _shape(last, tensor.shape, arch), _Change(tensor, name, last, kept, arch))


class _Change:
    """Reads a tensor, and gives it llama.cpp's values, shape and dtype."""

    def __init__(self, tensor: LazyTensor, name: str, last: str, dtype: torch.dtype, arch: Architecture) -> None:
        self._read: Callable[[], Tensor] = tensor.read
        self._name, self._last, self._dtype = name, last, dtype
        self._shape = _shape(last, tensor.shape, arch)

    def __call__(self) -> Tensor:
        value = self._read()
        if self._last == "ssm_a":
            value = -value.float().exp()
        cast = value.to(self._dtype).reshape(self._shape).contiguous()
        if self._dtype == torch.float16 and not torch.isfinite(cast).all():
            words = f"has values beyond 65,504 ({float(value.abs().max()):.3g}), which float16 cannot say"
            raise ProblemsError([Problem("--dtype", f"{self._name} {words}; give bfloat16 or float32")])
        return cast


def _shape(last: str, shape: tuple[int, ...], arch: Architecture) -> tuple[int, ...]:
    if last in ("ssm_a", "ssm_d"):
        return (*shape, 1)
    if last == "ssm_norm.weight":
        return (arch.mamba_num_groups, shape[0] // arch.mamba_num_groups)
    return (shape[0], shape[2]) if last == "ssm_conv1d.weight" else shape
