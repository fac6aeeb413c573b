"""Granite 4.0 (GraniteMoeHybrid): blocks of Mamba or attention, each with a gated MLP in two tensors.

With `num_local_experts` above 0 that MLP is a mixture's shared expert, and the experts of a block are one tensor for
each of their linears, as here. Its four multipliers are fields of the model section, applied as the model runs;
weights stay as they are.
"""

from __future__ import annotations

from typing import Any

from ..problems import Problem
from .adapter import Adapter, Field, Model, Only
from .blocks import (
    ATTENTION,
    GATED,
    HINTS,
    NO_WINDOW,
    OUTER,
    PACKED,
    activation,
    attention_fields,
    block_count,
    blocks_of,
    feed_forwards,
    mixers,
    older_words,
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
    without_mamba,
    write_expansion,
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
    SOME,
    TOPK,
    has_experts,
    router_problems,
    sizes,
)
from .positions import FIELDS, read_rotary, rotary_problems, write_rotary
from .said import Said
from .scan import EPSILON, epsilon_problems, one_epsilon, read_step_limit

NAMES = {
    **ATTENTION,
    **MAMBA,
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("shared_mlp.input_linear.weight",),  # [gate; up] there too
    "mlp.linear_fc2.weight": ("shared_mlp.output_linear.weight",),
    "mlp.router.weight": ("block_sparse_moe.router.layer.weight",),
    "mlp.experts.experts.linear_fc1.weight": ("block_sparse_moe.input_linear.weight",),  # [E, gate + up, h]
    "mlp.experts.experts.linear_fc2.weight": ("block_sparse_moe.output_linear.weight",),
    "mlp.shared_experts.linear_fc1.weight": ("shared_mlp.input_linear.weight",),
    "mlp.shared_experts.linear_fc2.weight": ("shared_mlp.output_linear.weight",),
}
DENSE, MIXED = feed_forwards(NAMES)
UNSAID = {COUNT: 8, TOPK: 2, NEURONS: 11008, SHARED: 1024}  # of the configuration class, where a file does not say it
# What its mixtures compute: a softmax over the chosen experts' scores.
MIXTURE = {SCORE: "softmax", BIAS: False, FIRST: False, SCALING: None, SHARED: SOME, LATENT: 0}
_EPSILON = "Granite has one for all norms"
_FFN = Field(
    ours="ffn_hidden_size",
    keys=("shared_intermediate_size",),
    default=1024,
    when=lambda model: not has_experts(model),
)
_MULTIPLIERS = tuple(
    Field(ours=ours, keys=(theirs,), kind="number", default=1.0)
    for ours, theirs in {
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_scaling": "logits_scaling",
    }.items()
)


def _pattern(said: Said) -> str | None:
    blocks, known = blocks_of(said), mixers(NAMES)
    experts = said.config.get("num_local_experts", UNSAID[COUNT])
    if experts is not None and (isinstance(experts, bool) or not isinstance(experts, int) or experts < 0):
        said.wrong("num_local_experts", f"{repr(experts)[:40]} must be a number of experts, 0 for none")
        return None
    listed = said.value(("layer_types", "layers_block_type"))
    if blocks is None:
        return None
    if listed is None:
        listed = [next(iter(mixers(MAMBA)))] * blocks
    if not isinstance(listed, list) or any(not isinstance(word, str) or word not in known for word in listed):
        said.wrong("layer_types", f"{str(listed)[:80]} must be a list of {', '.join(known)}")
        return None
    if len(listed) != blocks:
        said.wrong("layer_types", f"lists {len(listed)} layers, num_hidden_layers says {blocks}; one of them is stale")
        return None
    return pattern_of(listed, NAMES, MIXED if experts else DENSE)


def _layers(pattern: str) -> dict[str, Any]:
    return {**block_count(pattern), "layer_types": older_words(NAMES, pattern)}


def _read(said: Said, model: Model) -> dict[str, Any]:
    read_step_limit(said)
    read_expansion(said, model)
    positions = said.config.get("position_embedding_type")
    if positions not in (None, "nope", "rope"):
        said.wrong("position_embedding_type", f"{positions!r} must be rope or nope (none)")
    return {**_scale(said, model), **without_mamba(model), **(read_rotary(said) if positions == "rope" else {})}


def _scale(said: Said, model: Model) -> dict[str, Any]:
    """None where it is what attention has anyhow: a model section need not say that."""
    scale, channels = said.config.get("attention_multiplier"), model["kv_channels"]
    scale = said.number("attention_multiplier", 1.0 if scale is None else scale)
    usual = isinstance(channels, int) and channels > 0 and scale == channels**-0.5
    return {"softmax_scale": None if usual else scale}


def _write(model: Model) -> dict[str, Any]:
    rotary = model["position_embedding_type"] == "rope"
    return {
        "attention_multiplier": model["softmax_scale"] or model["kv_channels"] ** -0.5,
        **(
            {"output_router_logits": False}
            if has_experts(model)
            else {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": model["ffn_hidden_size"]}
        ),
        **write_expansion(model),
        "position_embedding_type": "rope" if rotary else "nope",
        **(write_rotary(model) if rotary else {}),
    }


def _problems(model: Model) -> list[Problem]:
    rotary = rotary_problems(model) if model["position_embedding_type"] != "none" else []
    found = rotary + epsilon_problems(_EPSILON)(model) + expansion_problems(model, "Granite")
    return found + router_problems(model, "Granite", MIXTURE)


GRANITE = Adapter(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    words="Granite",
    tags=("granite", "granitemoehybrid", "mamba2", "hybrid"),
    depth_unit="block",
    transformers=5,
    outer=OUTER,
    names=NAMES,
    packed={row: packed for row, packed in PACKED.items() if len(NAMES.get(row, ())) > 1},
    between="post_attention_layernorm",
    pattern=_pattern,
    layers=_layers,
    pattern_problems=whole_blocks(NAMES),
    fields=(
        *attention_fields(groups=None, ffn=_FFN),
        *sizes(("num_local_experts",), neurons="intermediate_size", shared="shared_intermediate_size", unsaid=UNSAID),
        *MAMBA_SIZES,
        activation({"silu": "silu"}),
        *_MULTIPLIERS,
    ),
    hints=HINTS,
    only=(
        one_epsilon(("rms_norm_eps",), _EPSILON, default=1e-6),
        Only(keys=("normalization_function",), allowed=("rmsnorm",), why="as Megatron has it here", unsaid=True),
        Only(keys=("attention_bias",), allowed=(False,), why="parameters that no row of the table has"),
        NO_WINDOW,
        *MAMBA_ONLY,
    ),
    has={**GATED, "layernorm_epsilon": EPSILON},
    speaks=(*FIELDS, "layernorm_epsilon", "softmax_scale", *ROUTING),
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
