"""Llama: attention and a gated MLP in every block, rotary positions, perhaps scaled as Llama 3.1 does.

`attention_bias` and `mlp_bias` come together or not at all: Megatron has one flag for the biases of all linears.
"""

from __future__ import annotations

from typing import Any

from ..problems import Problem
from .adapter import Adapter, Model, Only
from .blocks import (
    ATTENTION,
    GATED,
    HINTS,
    NO_EXPERTS,
    NO_WINDOW,
    OUTER,
    PACKED,
    QKV_BIAS,
    activation,
    attention_fields,
    attention_pattern,
    block_count,
    epsilon,
    gated_mlp,
    whole_blocks,
)
from .positions import FIELDS, read_rotary, rotary_problems, write_rotary
from .said import Said

NAMES = {
    **ATTENTION,
    **QKV_BIAS,
    **gated_mlp("post_attention_layernorm"),
    "self_attention.linear_proj.bias": ("self_attn.o_proj.bias",),
    "mlp.linear_fc1.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.linear_fc2.bias": ("mlp.down_proj.bias",),
}


def _read(said: Said, model: Model) -> dict[str, Any]:
    biases = {key: said.config.get(key) or False for key in ("attention_bias", "mlp_bias")}
    if len(set(biases.values())) > 1 or not all(isinstance(value, bool) for value in biases.values()):
        words = f"{biases['attention_bias']!r} and mlp_bias {biases['mlp_bias']!r} must both be true or both be false: "
        said.wrong("attention_bias", f"{words}Megatron's linears all have a bias, or none")
    return {**read_rotary(said), **({"add_bias_linear": True} if biases["mlp_bias"] else {})}


def _write(model: Model) -> dict[str, Any]:
    biases = bool(model["add_bias_linear"])
    return {**write_rotary(model), "attention_bias": biases, "mlp_bias": biases}


def _problems(model: Model) -> list[Problem]:
    found = rotary_problems(model)
    if model["add_qkv_bias"] and not model["add_bias_linear"]:
        words = "True cannot be said in Hugging Face's Llama, where the output projection has a bias then too"
        found.append(Problem("model.add_qkv_bias", words))
    return found + divisible_problems(model)


def divisible_problems(model: Model) -> list[Problem]:
    """transformers 5 checks it, although heads have a size of their own."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    if hidden % heads == 0:
        return []
    words = (
        f"{hidden} must be a multiple of num_attention_heads {heads}, or transformers 5 refuses the Llama; choose such"
    )
    return [Problem("model.hidden_size", words)]


LLAMA = Adapter(
    model_type="llama",
    architecture="LlamaForCausalLM",
    words="Llama",
    tags=("llama",),
    depth_unit="block",
    outer=OUTER,
    names=NAMES,
    packed=PACKED,
    buffers=("self_attn.rotary_emb.inv_freq",),
    between="post_attention_layernorm",
    pattern=attention_pattern(NAMES),
    layers=block_count,
    pattern_problems=whole_blocks(NAMES),
    fields=(*attention_fields(groups=None), activation(), epsilon()),
    hints=HINTS,
    only=(
        Only(keys=("pretraining_tp",), allowed=(1,), why="products of a tensor-parallel pretraining are not repeated"),
        NO_EXPERTS,
        NO_WINDOW,
    ),
    has=GATED,
    speaks=(*FIELDS, "add_bias_linear", "add_qkv_bias"),
    read=_read,
    write=_write,
    fixed={"use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02},
    problems=_problems,
    divides={"num_attention_heads": "hidden_size"},
)
