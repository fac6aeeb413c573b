"""Bamba: Mamba blocks, a few of attention that turns half of a head's channels, a gated MLP in every block."""

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
    activation,
    attention_fields,
    block_count,
    blocks_of,
    gated_mlp,
    mixers,
    pattern_of,
    whole_blocks,
)
from .mamba_blocks import (
    MAMBA,
    MAMBA_FIXED,
    MAMBA_ONLY,
    MAMBA_SIZES,
    TOGETHER,
    expansion_problems,
    read_expansion,
    write_expansion,
)
from .positions import FIELDS, read_rotary, rotary_problems, write_rotary
from .said import Said
from .scan import EPSILON, epsilon_problems, one_epsilon, read_step_limit

TURNED = 0.5  # of a head's channels, whatever a file says
NAMES = {**ATTENTION, **MAMBA, **gated_mlp("pre_ff_layernorm", "feed_forward")}
_ATTENTION, _MAMBA = (next(iter(mixers(part))) for part in (ATTENTION, MAMBA))
_EPSILON = "Bamba has one for all norms"
_NO_ROWS = "parameters that no row of the table has"


def _pattern(said: Said) -> str | None:
    blocks, at = blocks_of(said), said.config.get("attn_layer_indices") or []
    if not isinstance(at, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in at):
        said.wrong("attn_layer_indices", f"{str(at)[:60]} must be a list of the blocks with attention")
        return None
    if blocks is not None and any(not 0 <= i < blocks for i in at):
        said.wrong("attn_layer_indices", f"{at} must be blocks below num_hidden_layers, {blocks}")
        return None
    return None if blocks is None else pattern_of([_ATTENTION if i in at else _MAMBA for i in range(blocks)], NAMES)


def _layers(pattern: str) -> dict[str, Any]:
    letter = mixers(ATTENTION)[_ATTENTION]
    return {
        **block_count(pattern),
        "attn_layer_indices": [block for block, mixer in enumerate(pattern[::2]) if mixer == letter],
    }


def _read(said: Said, model: Model) -> dict[str, Any]:
    read_step_limit(said)
    read_expansion(said, model)
    turned, channels = said.config.get("attn_rotary_emb"), model["kv_channels"]
    if turned is not None and channels is not None and turned != TURNED * channels:
        said.wrong("attn_rotary_emb", f"{turned!r} must be {TURNED} x {channels}: Bamba turns that half of a head")
    return read_rotary(said, TURNED)


def _write(model: Model) -> dict[str, Any]:
    return {**write_expansion(model), **write_rotary(model)}


def _problems(model: Model) -> list[Problem]:
    return rotary_problems(model, TURNED) + epsilon_problems(_EPSILON)(model) + expansion_problems(model, "Bamba")


BAMBA = Adapter(
    model_type="bamba",
    architecture="BambaForCausalLM",
    words="Bamba",
    tags=("bamba", "mamba2", "hybrid"),
    depth_unit="block",
    transformers=5,
    outer={**OUTER, "decoder.final_norm.weight": "model.final_layernorm.weight"},
    names=NAMES,
    packed=PACKED,
    between="pre_ff_layernorm",
    pattern=_pattern,
    layers=_layers,
    pattern_problems=whole_blocks(NAMES, needs=MAMBA),
    fields=(*attention_fields(groups=8), *MAMBA_SIZES, activation({"silu": "silu"})),
    hints=HINTS,
    only=(
        one_epsilon(("rms_norm_eps",), _EPSILON),
        Only(keys=("attention_bias",), allowed=(False,), why=_NO_ROWS),
        Only(keys=("mlp_bias",), allowed=(False,), why=_NO_ROWS),
        NO_EXPERTS,
        NO_WINDOW,
        *MAMBA_ONLY,
    ),
    has={**GATED, "layernorm_epsilon": EPSILON},
    speaks=(*FIELDS, "layernorm_epsilon"),
    read=_read,
    write=_write,
    fixed={
        **MAMBA_FIXED,
        "use_cache": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    },
    problems=_problems,
    together=TOGETHER,
)
