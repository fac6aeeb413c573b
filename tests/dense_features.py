"""The features of dense parents, one by one and together: what a model section says of each, on the small parent."""

from typing import Any

import expert_features
from small_parent import architecture

from nemo_elastic.config.function_fields import ARITHMETIC
from nemo_elastic.space.architecture import Architecture

ROTARY = {"position_embedding_type": "rope", "rotary_base": 500.0}
SCALED = {
    "rope_scaling_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 3.0,
    "rope_original_max_position_embeddings": 64,
}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 6.0, "softmax_scale": 0.2}
FEATURES: dict[str, dict[str, Any]] = {
    "gated": {"gated_linear_unit": True, "activation_func": "silu"},
    "gelu": {"activation_func": "gelu"},
    "rotary": ROTARY,
    "partial": {**ROTARY, "rotary_percent": 0.5},
    "interpolated": {**ROTARY, "seq_len_interpolation_factor": 2.0},
    "scaled": {**ROTARY, **SCALED},
    "qk_norm": {"qk_layernorm": True, "layernorm_epsilon": 1e-6},
    "qkv_bias": {"add_qkv_bias": True},
    "biases": {"add_bias_linear": True},
    "multipliers": MULTIPLIERS,
    "all": {
        **ROTARY, **SCALED, "rotary_percent": 0.5, "gated_linear_unit": True, "activation_func": "silu",
        "qk_layernorm": True, "add_bias_linear": True, "add_qkv_bias": True, **MULTIPLIERS,
    },
}  # fmt: skip
SWIGLU = {"gated_linear_unit": True, "activation_func": "silu"}
FAMILIES: dict[str, dict[str, Any]] = {  # what each family of Hugging Face has of them together
    "llama": {**SWIGLU, **ROTARY, **SCALED, "hybrid_override_pattern": "*-*-*-*-"},
    "qwen2": {**SWIGLU, **ROTARY, "add_qkv_bias": True, "hybrid_override_pattern": "*-*-*-*-"},
    "qwen3": {**SWIGLU, **ROTARY, "qk_layernorm": True, "hybrid_override_pattern": "*-*-*-*-"},
    "bamba": {**SWIGLU, **ROTARY, "rotary_percent": 0.5, "hybrid_override_pattern": "M-*-M-*-"},
    "granite": {**SWIGLU, **MULTIPLIERS, "hybrid_override_pattern": "M-*-M-*-"},
}
TRANSFORMER = "*-*-*-"  # no Mamba layer: a Llama's


def parts(feature: str, pattern: str | None = None, **more: Any) -> tuple[Architecture, dict[str, Any]]:
    """(sizes and flags, the rest of the function) of a small parent with a feature, or with experts; '': none."""
    if feature in expert_features.FEATURES:
        return expert_features.parts(feature, **more)
    said = FEATURES.get(feature, {})
    flags = {name: value for name, value in said.items() if name not in ARITHMETIC}
    arch = architecture(**({} if pattern is None else {"pattern": pattern}), **flags, **more)
    return arch, {name: value for name, value in said.items() if name in ARITHMETIC}
