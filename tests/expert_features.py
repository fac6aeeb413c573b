"""Mixtures of experts as published parents have them, on the small parent: sizes, flags, the rest of the function."""

from typing import Any

import pytest
from small_parent import architecture

from nemo_elastic.config.function_fields import ARITHMETIC
from nemo_elastic.space.architecture import Architecture

PATTERN = "ME*EM-*E"
SIZES = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
FEATURES: dict[str, dict[str, Any]] = {
    "nemotron": {**SIGMOID, "moe_router_topk_scaling_factor": 2.5},
    "latent": {**SIGMOID, "moe_latent_size": 12},
    "qwen": {"gated_linear_unit": True, "activation_func": "silu", "moe_shared_expert_intermediate_size": 0},
    "granite": {"gated_linear_unit": True, "activation_func": "silu", "moe_router_topk": 3},
    "softmax_first": {"moe_router_pre_softmax": True},
    "one": {**SIGMOID, "moe_router_topk": 1},
}
DIMS = {
    "num_moe_experts": {"choices": [8, 4], "per_layer": True},
    "moe_ffn_hidden_size": {"choices": [16, 12, 8], "per_layer": True},
    "moe_shared_expert_intermediate_size": {"choices": [24, 12]},
}


def skip_without_slot() -> None:
    """megatron-core 0.15 has no place for experts in its hybrid stack."""
    from nemo_elastic.mcore.kernels.kind_modules import SLOTS

    if "E" not in SLOTS:
        pytest.skip("this line of megatron-core has no slot for experts")


def parts(feature: str, pattern: str = PATTERN, **more: Any) -> tuple[Architecture, dict[str, Any]]:
    """(sizes and flags, the rest of the function) of a small parent with experts; skips where Megatron has none."""
    skip_without_slot()
    said = SIZES | FEATURES[feature]
    own = {name: value for name, value in said.items() if name not in ARITHMETIC}
    return architecture(pattern, **own, **more), {n: value for n, value in said.items() if n in ARITHMETIC}
