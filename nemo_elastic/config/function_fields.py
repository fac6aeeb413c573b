"""What decides a model's function beside the sizes of its tensors: activation, epsilon, positions, multipliers.

    rotary:       of a head's first d = rotary_percent kv_channels, pair i turns by position w_i
                  w_i = rotary_base^(-2i/d)
    scaled:       w_i / factor where the wavelength 2 pi / w_i is long, w_i where it is short, between them a mean
                  (Llama 3.1; `rope_*`);  positions / seq_len_interpolation_factor (linear)
    multipliers:  x = embedding_multiplier E[token];  x += residual_multiplier sublayer(norm(x));
                  logits = W norm(x) / logits_scaling  (Granite; `softmax_scale` is its attention multiplier)

Names are those of NeMo's `SSMConfig`, but for `OWN`, which it has no field for. No torch here.
"""

from collections.abc import Mapping
from math import inf
from typing import Any

from ..problems import Problem

# With what Megatron's plain stack here takes where a model section does not say it.
ARITHMETIC: dict[str, Any] = {
    "activation_func": "squared_relu",
    "layernorm_epsilon": 1e-5,
    "softmax_scale": None,
    "fp32_residual_connection": False,
    "position_embedding_type": "none",
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "seq_len_interpolation_factor": None,
    "rope_scaling_factor": None,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 8192,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
}
POSITIONS = ("none", "rope")
ROTARY = ("rotary_percent", "rotary_base", "seq_len_interpolation_factor")
ROPE_SCALING = tuple(name for name in ARITHMETIC if name.startswith("rope_"))
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
SCORES = ("softmax", "sigmoid")
ROUTING = tuple(name for name in ARITHMETIC if name.startswith("moe_router_"))
OWN = (*ROPE_SCALING, *MULTIPLIERS)
ACTIVATIONS = ("squared_relu", "relu", "gelu", "silu")
_NUMBERS = ("layernorm_epsilon", "softmax_scale", "rotary_base", "seq_len_interpolation_factor", *OWN)
_OF_ROUTERS = ("moe_router_topk_scaling_factor",)


def arithmetic_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model section says of the function beside the sizes, defaults filled in."""
    return {n: default if model.get(n) is None else model[n] for n, default in ARITHMETIC.items()}


def beyond_stock(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of a model section that NeMo's `SSMConfig` and the stock hybrid stack would not follow.

    `qk_layernorm` is a field there; the stock stack names no norms for it, and silently builds none.
    """
    said = arithmetic_of(model)
    if said["rope_scaling_factor"] is None:
        said |= {name: ARITHMETIC[name] for name in ROPE_SCALING}
    own = tuple(name for name in OWN if said[name] != ARITHMETIC[name])
    return own + (("qk_layernorm",) if model.get("qk_layernorm") else ())


def arithmetic_problems(model: Mapping[str, Any]) -> list[Problem]:
    """Every illegal value."""
    found, said = [], arithmetic_of(model)
    if said["activation_func"] not in ACTIVATIONS:
        words = f"{said['activation_func']!r} must be one of {', '.join(ACTIVATIONS)}"
        found.append(Problem("model.activation_func", words))
    if said["moe_router_score_function"] not in SCORES:
        words = f"{said['moe_router_score_function']!r} must be one of {', '.join(SCORES)}"
        found.append(Problem("model.moe_router_score_function", words))
    for name in (*_NUMBERS, *_OF_ROUTERS):
        if said[name] is not None and not _is_positive(said[name]):
            found.append(Problem(f"model.{name}", f"{said[name]!r} must be a number above 0"))
    for name in ("fp32_residual_connection", "moe_router_pre_softmax"):
        if not isinstance(said[name], bool):
            found.append(Problem(f"model.{name}", f"{said[name]!r} must be true or false"))
    return found + _position_problems(model, said) + _routing_problems(model, said)


def _routing_problems(model: Mapping[str, Any], said: Mapping[str, Any]) -> list[Problem]:
    found = []
    if model.get("moe_router_load_balancing_type") == "sinkhorn":
        words = "'sinkhorn' is another routing, which is not supported; remove it"
        found.append(Problem("model.moe_router_load_balancing_type", words))
    if model.get("moe_router_bias_update_rate"):
        words = (
            "is no size or function of the model, and nothing here follows it; give train.moe_router_bias_update_rate"
        )
        found.append(Problem("model.moe_router_bias_update_rate", words))
    if not model.get("num_moe_experts") or said["moe_router_score_function"] != "softmax":
        return found
    if model.get("moe_router_enable_expert_bias"):
        words = "True needs moe_router_score_function=sigmoid: a softmax takes no bias"
        found.append(Problem("model.moe_router_enable_expert_bias", words))
    if model.get("moe_router_topk") == 1 and not said["moe_router_pre_softmax"]:
        words = "1 with a softmax over the chosen expert alone gives every token the weight 1, which learns nothing; "
        words += "a softmax over all experts (moe_router_pre_softmax) is what such a model has"
        found.append(Problem("model.moe_router_topk", words))
    return found


def _position_problems(model: Mapping[str, Any], said: Mapping[str, Any]) -> list[Problem]:
    kind, percent = said["position_embedding_type"], said["rotary_percent"]
    if kind not in POSITIONS:
        words = f"{kind!r} must be one of {', '.join(POSITIONS)}: other positions are not supported"
        return [Problem("model.position_embedding_type", words)]
    if kind == "none":
        words = "is said, and position_embedding_type is none, under which nothing turns; set it to rope, or remove it"
        names = (*ROTARY, *ROPE_SCALING)
        return [Problem(f"model.{name}", words) for name in names if said[name] != ARITHMETIC[name]]
    if not _is_positive(percent) or percent > 1:
        return [Problem("model.rotary_percent", f"{percent!r} must be a number above 0 and at most 1")]
    channels = model.get("kv_channels")
    if isinstance(channels, int) and (int(channels * percent) % 2 or int(channels * percent) < 2):
        words = f"{percent} of {channels} head channels must be an even number above 0: they turn in pairs"
        return [Problem("model.rotary_percent", words)]
    if said["rope_scaling_factor"] is None:
        words = "is said without model.rope_scaling_factor; give that too, or remove it"
        return [Problem(f"model.{n}", words) for n in ROPE_SCALING[1:] if said[n] != ARITHMETIC[n]]
    low, high = said["rope_low_freq_factor"], said["rope_high_freq_factor"]
    if _is_positive(low) and _is_positive(high) and low >= high:
        return [Problem("model.rope_low_freq_factor", f"{low} must be below model.rope_high_freq_factor={high}")]
    return []


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < inf
