"""Qwen3, dense: a Llama with an RMS norm of every head's queries and keys, and no biases."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter, Model, Only
from .blocks import (
    ATTENTION,
    GATED,
    HEAD_NORMS,
    HINTS,
    OUTER,
    PACKED,
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

NAMES = {**ATTENTION, **HEAD_NORMS, **gated_mlp("post_attention_layernorm")}
# `sliding_window` and `max_window_layers` mean nothing without use_sliding_window, which has to be false.
NO_WINDOWS = {"use_sliding_window": False, "sliding_window": None, "use_cache": True}


def read_positions(said: Said, model: Model) -> dict[str, Any]:
    """Rotary, of all channels of a head."""
    return read_rotary(said)


QWEN3 = Adapter(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    words="Qwen3",
    tags=("qwen3",),
    depth_unit="block",
    outer=OUTER,
    names=NAMES,
    packed=PACKED,
    between="post_attention_layernorm",
    pattern=attention_pattern(NAMES),
    layers=block_count,
    pattern_problems=whole_blocks(NAMES),
    fields=(*attention_fields(groups=32, head_dim=128), activation(), epsilon()),
    hints=HINTS,
    only=(
        Only(
            keys=("attention_bias",),
            allowed=(False,),
            why="its MLPs have none, and Megatron's linears all have a bias, or none",
        ),
    ),
    has={**GATED, "qk_layernorm": True},
    speaks=FIELDS,
    read=read_positions,
    write=write_rotary,
    fixed={**NO_WINDOWS, "attention_dropout": 0.0, "initializer_range": 0.02},
    problems=rotary_problems,
)
