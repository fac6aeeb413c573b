"""NemotronH, Nemotron Nano v2 and their relatives: a list of layers, of which any may be dropped.

Every layer's names and words stand with its kind (`kinds.HuggingFace`). `time_step_min`, `time_step_max` and
`time_step_floor` are values of initialisation: accepted, never applied (the kernels that train and serve this family do
not clamp the step).
"""

from __future__ import annotations

from typing import Any

from ..kinds import kind_of, kinds, kinds_of, sizes
from ..problems import Problem
from ..space.architecture import DEEPEST, layers_with, without_prediction
from .adapter import Adapter, Field, Model, Only
from .mixture import (
    BIAS,
    FIRST,
    LATENT,
    NO_GROUPS,
    ROUTING,
    SCALING,
    SCORE,
    SHARED,
    SOME,
    TOPK,
    check_renormalised,
    has_experts,
    read_scaling,
    router_problems,
)
from .said import Said
from .scan import EPSILON, NO_STEP_ABOVE, NO_STEP_BELOW, epsilon_problems, one_epsilon, read_step_limit

_SAID = [kind for kind in kinds() if kind.huggingface]
_BLOCKS = {kind.letter: kind.huggingface.blocks for kind in _SAID}
KIND_OF_BLOCK = {
    **{today: letter for letter, (today, *_) in _BLOCKS.items()},
    **{older: letter for letter, (_, *rest) in _BLOCKS.items() for older in rest},
}
ACTIVATIONS = {"squared_relu": "relu2", "relu": "relu", "gelu": "gelu", "silu": "silu"}
NULL = {"num_query_groups": "num_attention_heads"}  # every query head has its own key head
PREDICTION = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern", "mtp_layers_block_type")
# What its mixtures compute: any other router, and one without a shared expert, is another function of its tensors.
MIXTURE = {SCORE: "sigmoid", BIAS: True, FIRST: False, SHARED: SOME}
_NO_ROWS = "parameters that no row of the table has"
ONLY = (
    one_epsilon(("layer_norm_epsilon", "rms_norm_eps"), "NemotronH has one for all norms"),
    Only(
        keys=("mamba_hidden_act",),
        allowed=("silu", "swish"),
        why="Megatron's Mamba mixer has no other activation of its convolution",
    ),
    Only(keys=("conv_kernel", "mamba_d_conv"), allowed=(4,), why="as Megatron has it", unsaid=True),
    Only(keys=("use_conv_bias", "mamba_conv_bias"), allowed=(True,), why="Megatron's convolution always has a bias"),
    *(
        Only(keys=(key,), allowed=(False,), why=_NO_ROWS)
        for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")
    ),
    Only(keys=("sliding_window",), allowed=(None,), why="attention sees everything before a token"),
    Only(
        keys=("n_shared_experts",),
        allowed=(1, None),
        why="a mixture has one shared expert here",
        unsaid=True,
        when=has_experts,
    ),
    NO_GROUPS,
)
# What a NemotronH out of Megatron always is. The step of the scan is softplus(dt + dt_bias), unclamped, in Megatron's
# kernels. transformers' prefill (not its decode) raises it to `time_step_min`, other readers clamp it to
# `time_step_limit`; these values do nothing to any step that matters, and 0 and infinity are no choice: the first has
# no logarithm, the second is no JSON.
FIXED = {
    "chunk_size": 128,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_min": NO_STEP_BELOW,
    "time_step_limit": [0.0, NO_STEP_ABOVE],
    "time_step_max": 0.1,  # this and the floor are of initialisation only, as are the two after them
    "time_step_floor": 1e-4,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "num_nextn_predict_layers": 0,
    "use_cache": True,
}


def _pattern(said: Said) -> str | None:
    key, pattern = "hybrid_override_pattern", said.config.get("hybrid_override_pattern")
    blocks = said.value(("layers_block_type", "layer_types"))
    if blocks is not None:
        known = isinstance(blocks, list) and all(isinstance(b, str) and b in KIND_OF_BLOCK for b in blocks)
        if not known:
            said.wrong("layers_block_type", f"{str(blocks)[:80]} must be a list of {', '.join(KIND_OF_BLOCK)}")
            return None
        listed = "".join(KIND_OF_BLOCK[block] for block in blocks)
        if pattern is not None and pattern != listed:
            said.wrong(key, f"{pattern} says other layers than layers_block_type, {listed}; one is stale")
        pattern = listed
    if not isinstance(pattern, str) or not pattern:
        words = "is not given, nor layers_block_type" if pattern is None else f"{pattern!r} must be a string of letters"
        said.wrong(key, words)
        return None
    pattern = without_prediction(pattern)
    if len(pattern) > DEEPEST:
        said.wrong(key, f"{len(pattern):,} layers, at most {DEEPEST:,} can be described: is it a typo?")
        return None
    for kind in kinds_of(pattern):
        if kind.huggingface is None:
            words = f"{layers_with(pattern, kind.letter)}: {kind.words} is not read from Hugging Face folders yet"
            said.wrong(key, words)
            return None
    layers = said.config.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        words = f"{layers!r} says another depth than the {len(pattern)} layers of {pattern}; one of them is stale"
        said.wrong("num_hidden_layers", words)
    return pattern


def _layers(pattern: str) -> dict[str, Any]:
    return {
        "hybrid_override_pattern": pattern,
        "layers_block_type": [kind_of(letter).huggingface.blocks[0] for letter in pattern],
        "num_hidden_layers": len(pattern),
    }


def _pattern_problems(pattern: str, reader: str) -> list[Problem]:
    return [
        Problem("model.hybrid_override_pattern", f"{kind.letter!r} ({kind.words}) cannot be said in {reader}")
        for kind in kinds()
        if kind.huggingface is None and kind.letter in pattern
    ]


def _read(said: Said, model: Model) -> dict[str, Any]:
    read_step_limit(said)
    if (blocks := said.config.get(PREDICTION[0])) is not None and (not isinstance(blocks, int) or blocks < 0):
        said.wrong(PREDICTION[0], f"{blocks!r} must be a number of blocks, 0 or more")
    if not has_experts(model):
        return {}
    check_renormalised(said, model)
    return {SCORE: "sigmoid", BIAS: True, **read_scaling(said)}


def _write(model: Model) -> dict[str, Any]:
    experts = {
        "norm_topk_prob": model[TOPK] != 1,
        "routed_scaling_factor": model[SCALING] or 1.0,
        "moe_latent_size": model[LATENT] or None,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "output_router_logits": False,
    }
    return {
        "layer_norm_epsilon": model["layernorm_epsilon"],
        "conv_kernel": model["mamba_conv_kernel"],
        "residual_in_fp32": bool(model["fp32_residual_connection"]),
        **(experts if has_experts(model) else {}),
    }


def _problems(model: Model) -> list[Problem]:
    found = epsilon_problems("NemotronH has one for all norms")(model)
    return found + router_problems(model, "NemotronH", MIXTURE)


def _sizes() -> tuple[Field, ...]:
    """Of every kind; a mixture's of models that have one, its latent size none where nothing is said."""
    of_some = {size.name for size in sizes() if size.none_if_absent}
    return tuple(
        Field(
            ours=size.name,
            keys=size.huggingface,
            null=NULL.get(size.name),
            default=0 if size.name == LATENT else None,
            when=has_experts if size.name in of_some else lambda model: True,
        )
        for size in sizes()
        if size.huggingface
    )


NEMOTRON_H = Adapter(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    words="NemotronH",
    tags=("nemotron_h", "mamba2", "hybrid"),
    transformers=5,
    outer={
        "embedding.word_embeddings.weight": "backbone.embeddings.weight",
        "decoder.final_norm.weight": "backbone.norm_f.weight",
        "output_layer.weight": "lm_head.weight",
    },
    prefixes=("backbone.", "model."),
    names={row: names for kind in _SAID for row, names in kind.huggingface.names.items()},
    packed={row: packed for kind in _SAID for row, packed in kind.huggingface.packed.items()},
    pattern=_pattern,
    layers=_layers,
    pattern_problems=_pattern_problems,
    fields=(
        Field(ours="hidden_size", keys=("hidden_size",)),
        *_sizes(),
        Field(ours="vocab_size", keys=("vocab_size",)),
        Field(ours="share_embeddings_and_output_weights", keys=("tie_word_embeddings",), kind="flag", default=False),
        Field(ours="activation_func", keys=("mlp_hidden_act",), kind="word", default="squared_relu", words=ACTIVATIONS),
    ),
    hints=(
        Field(ours="seq_length", keys=("max_position_embeddings",), kind="hint"),
        Field(ours="init_method_std", keys=("initializer_range",), kind="hint"),
        Field(ours="hidden_dropout", keys=("hidden_dropout",), kind="hint"),
        Field(ours="attention_dropout", keys=("attention_dropout",), kind="hint"),
    ),
    only=ONLY,
    has={"layernorm_epsilon": EPSILON, "softmax_scale": None},
    speaks=("layernorm_epsilon", "fp32_residual_connection", *ROUTING),
    handles=PREDICTION,
    left_out=("mtp.",),
    read=_read,
    write=_write,
    fixed=FIXED,
    problems=_problems,
    elsewhere={
        "hybrid_override_pattern": "hybrid_override_pattern or layers_block_type",
        "layernorm_epsilon": "layer_norm_epsilon",
        SCALING: "routed_scaling_factor",
    },
    unclamped={"time_step_min": NO_STEP_BELOW},
)
