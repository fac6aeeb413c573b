"""Qwen2 and Qwen2.5, dense: a Llama whose queries, keys and values always have a bias, and nothing else has."""

from __future__ import annotations

from .adapter import Adapter
from .blocks import (
    ATTENTION,
    GATED,
    HINTS,
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
from .positions import FIELDS, rotary_problems, write_rotary
from .qwen3 import NO_WINDOWS, read_positions

NAMES = {**ATTENTION, **QKV_BIAS, **gated_mlp("post_attention_layernorm")}

QWEN2 = Adapter(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    words="Qwen2",
    tags=("qwen2",),
    depth_unit="block",
    outer=OUTER,
    names=NAMES,
    packed=PACKED,
    between="post_attention_layernorm",
    pattern=attention_pattern(NAMES),
    layers=block_count,
    pattern_problems=whole_blocks(NAMES),
    fields=(*attention_fields(groups=32), activation(), epsilon()),
    hints=HINTS,
    only=(),
    has={**GATED, "add_qkv_bias": True},
    speaks=FIELDS,
    read=read_positions,
    write=write_rotary,
    fixed={**NO_WINDOWS, "attention_dropout": 0.0, "initializer_range": 0.02},
    problems=rotary_problems,
)
