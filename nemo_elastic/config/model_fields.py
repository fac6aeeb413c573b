"""The `model` section: NeMo `SSMConfig` field names, known without importing NeMo.

`assets/ssm_config_fields.json` lists them (a test compares it with the installed NeMo).
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..kinds import sizes
from ..problems import Problem, ProblemsError, did_you_mean
from ..space.architecture import Architecture, pattern_problems

_FIELDS_FILE = Path(__file__).resolve().parent.parent / "assets" / "ssm_config_fields.json"
REQUIRED = (
    "hybrid_override_pattern",
    "hidden_size",
    *(size.name for size in sizes() if size.required),
    "vocab_size",
)
# Of the kinds of layer, what a model section may leave out: kv_channels follows from others as in Megatron.
OPTIONAL = tuple(size.name for size in sizes() if not size.required and not size.fixed)
# What the one parameter table describes; another value would be counted, cut and exported wrongly.
ONLY: dict[str, Any] = {
    "gated_linear_unit": False,
    "position_embedding_type": "none",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "normalization": "RMSNorm",
    "num_moe_experts": None,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "heterogeneous_block_specs": False,
    "layernorm_zero_centered_gamma": False,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "window_size": None,
}
# What else decides the function, with what Megatron's plain stack here takes where a model section does not say it.
ARITHMETIC: dict[str, Any] = {
    "activation_func": "squared_relu",
    "layernorm_epsilon": 1e-5,
    "softmax_scale": None,
    "fp32_residual_connection": False,
}
ACTIVATIONS = ("squared_relu", "relu", "gelu", "silu")
FUNCTION = (*REQUIRED, *OPTIONAL, "share_embeddings_and_output_weights", *ARITHMETIC)


@lru_cache(maxsize=1)
def known_fields() -> frozenset[str]:
    """Every field name of `SSMConfig`, and `vocab_size`, the padded size, which NeMo derives from the tokenizer."""
    return frozenset((*json.loads(_FIELDS_FILE.read_text())["fields"], "vocab_size"))


def model_problems(model: Any) -> list[Problem]:
    """Unknown and missing fields, and what `Architecture` refuses."""
    if not isinstance(model, Mapping) or not model:
        return [Problem("model", f"is missing: it needs {', '.join(REQUIRED)}")]
    found = [
        Problem(f"model.{name}", f"is no field of NeMo's SSMConfig{did_you_mean(str(name), known_fields())}")
        for name in model
        if name not in known_fields()
    ]
    found += [
        Problem(f"model.{name}", f"{model[name]!r} is not supported by elastic models yet; only {only!r} is, remove it")
        for name, only in ONLY.items()
        if name in model and model[name] != only
    ]
    found += _arithmetic_problems(model)
    found += [Problem(f"model.{name}", "is required") for name in REQUIRED if model.get(name) is None]
    if any(p.key in {f"model.{name}" for name in REQUIRED} for p in found):
        return found
    pattern, layers = model["hybrid_override_pattern"], model.get("num_layers")
    if isinstance(pattern, str) and layers is not None and layers != len(pattern) and not pattern_problems(pattern):
        rule = f"{layers} must be the length of model.hybrid_override_pattern, {len(pattern)}; remove it or mend one"
        found.append(Problem("model.num_layers", rule))
    try:
        architecture_of(model)
    except ProblemsError as error:
        found += error.problems
    return found


def _arithmetic_problems(model: Mapping[str, Any]) -> list[Problem]:
    found, values = [], arithmetic_of(model)
    if values["activation_func"] not in ACTIVATIONS:
        words = f"{values['activation_func']!r} must be one of {', '.join(ACTIVATIONS)}"
        found.append(Problem("model.activation_func", words))
    for name in ("layernorm_epsilon", "softmax_scale"):
        value = values[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            found.append(Problem(f"model.{name}", f"{value!r} must be a number above 0"))
    if not isinstance(values["fp32_residual_connection"], bool):
        words = f"{values['fp32_residual_connection']!r} must be true or false"
        found.append(Problem("model.fp32_residual_connection", words))
    return found


def arithmetic_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model section says of the function beside the sizes, defaults filled in."""
    return {n: default if model.get(n) is None else model[n] for n, default in ARITHMETIC.items()}


def architecture_of(model: Mapping[str, Any]) -> Architecture:
    """The sizes that the `model` section describes; kv_channels defaults as Megatron's does.

    Raises:
        ProblemsError: with every illegal value.
    """
    given = {name: model[name] for name in REQUIRED}
    given |= {name: model[name] for name in OPTIONAL if model.get(name) is not None}
    if "kv_channels" not in given:
        hidden, heads = model["hidden_size"], model["num_attention_heads"]
        ints = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (hidden, heads))
        if not ints or hidden % heads:
            words = f"is missing and {hidden!r} is no multiple of {heads!r} attention heads; give it"
            raise ProblemsError([Problem("model.kv_channels", words)])
        given["kv_channels"] = hidden // heads
    return Architecture(
        **given,
        share_embeddings_and_output_weights=bool(model.get("share_embeddings_and_output_weights", False)),
    )
