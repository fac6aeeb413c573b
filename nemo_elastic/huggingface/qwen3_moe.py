"""Qwen3 with experts: a Qwen3 whose every block ends in a mixture, without a shared expert.

On disk an expert is three tensors, gate, up and down. `norm_topk_prob` says whether the softmax is over the chosen
experts' scores or over all; its class takes the second where a file says nothing.
"""

from __future__ import annotations

from typing import Any

from ..problems import Problem
from .adapter import BLOCKS_SAY, Adapter, Model, Only
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
    whole_blocks,
)
from .mixture import (
    BIAS,
    COUNT,
    FIRST,
    LATENT,
    NEURONS,
    ROUTING,
    SCALING,
    SCORE,
    SHARED,
    TOPK,
    router_problems,
    sizes,
)
from .positions import FIELDS, read_rotary, rotary_problems, write_rotary
from .qwen3 import NO_WINDOWS
from .said import Said

NAMES = {
    **ATTENTION,
    **HEAD_NORMS,
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.experts.linear_fc1.weight": ("mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight"),
    "mlp.experts.experts.linear_fc2.weight": ("mlp.experts.#.down_proj.weight",),
}
MIXTURE = {SCORE: "softmax", BIAS: False, SCALING: None, SHARED: 0, LATENT: 0}
UNSAID = {COUNT: 128, TOPK: 8, NEURONS: 768}  # of the configuration class, where a file does not say it
_ALL = "every block ends in experts here"


def _read(said: Said, model: Model) -> dict[str, Any]:
    renormalised = said.config.get("norm_topk_prob")
    if renormalised is not None and not isinstance(renormalised, bool):
        said.wrong("norm_topk_prob", f"{renormalised!r} must be true or false")
    return {**read_rotary(said), FIRST: not renormalised}


def _write(model: Model) -> dict[str, Any]:
    return {
        **write_rotary(model),
        "norm_topk_prob": not model[FIRST],
        "intermediate_size": model[NEURONS],  # of blocks without experts: there are none
        "mlp_only_layers": [],
    }


def _problems(model: Model) -> list[Problem]:
    return rotary_problems(model) + router_problems(model, "Qwen3-MoE", MIXTURE)


QWEN3_MOE = Adapter(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    words="Qwen3-MoE",
    tags=("qwen3_moe", "moe"),
    depth_unit="block",
    outer=OUTER,
    names=NAMES,
    packed={row: packed for row, packed in PACKED.items() if row in NAMES},
    between="post_attention_layernorm",
    pattern=attention_pattern(NAMES),
    layers=block_count,
    pattern_problems=whole_blocks(NAMES),
    fields=(
        *(field for field in attention_fields(groups=4) if field.ours != "ffn_hidden_size"),
        *sizes(("num_experts", "num_local_experts"), neurons="moe_intermediate_size", unsaid=UNSAID),
        activation(),
        epsilon(),
    ),
    hints=HINTS,
    only=(
        Only(
            keys=("attention_bias",),
            allowed=(False,),
            why="its experts have none, and Megatron's linears all have a bias, or none",
        ),
        Only(keys=("decoder_sparse_step",), allowed=(1,), why=_ALL),
        Only(keys=("mlp_only_layers",), allowed=([], None), why=_ALL, unsaid=True),
    ),
    has={**GATED, "qk_layernorm": True},
    speaks=(*FIELDS, *ROUTING),
    read=_read,
    write=_write,
    fixed={**NO_WINDOWS, "attention_dropout": 0.0, "initializer_range": 0.02, "output_router_logits": False},
    problems=_problems,
    elsewhere={**BLOCKS_SAY, FIRST: "norm_topk_prob"},
)
