"""config.json of Hugging Face's NemotronH from a plain model section (`config.parent_hf` reads one).

Written for old and new readers alike: `hybrid_override_pattern` with `num_hidden_layers`, and `layers_block_type`. What
NemotronH cannot say is refused by name. Every key that decides what is computed is written, the fixed ones too: a
default left to a reader is a default that it may not share.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..config.model_fields import architecture_of
from ..config.parent_hf import ACTIVATIONS, EPSILON, HINTS, NO_STEP_ABOVE, NO_STEP_BELOW, SIZES
from ..kinds import kind_of, kinds
from ..problems import Problem, raise_if_any

# model section -> config.json, where the value is the same.
CONFIG_FIELDS = {
    **{ours: names[0] for ours, names in SIZES.items()},
    **HINTS,
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "layernorm_epsilon": "layer_norm_epsilon",
}
# What NemotronH can only be: (model field, value that it must have, if given).
ONLY = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "position_embedding_type": "none",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": False,
    "qk_layernorm": False,
    "softmax_scale": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
# What a NemotronH out of Megatron always is. The step of the scan is softplus(dt + dt_bias), unclamped, in Megatron's
# kernels. transformers' prefill (not its decode) raises it to `time_step_min`, other readers clamp it to
# `time_step_limit`; these values do nothing to any step that matters, and 0 and infinity are no choice: the first has
# no logarithm, the second is no JSON.
FIXED = {
    "layer_norm_epsilon": EPSILON,
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "sliding_window": None,
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


def hf_config(model: Mapping[str, Any], dtype: torch.dtype, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json of a plain model section, for old and new readers alike.

    Raises:
        ProblemsError: the model has something that NemotronH cannot say.
    """
    arch = architecture_of(model)
    found = only_problems(model, "Hugging Face's NemotronH")
    activation = model.get("activation_func", "squared_relu")
    if activation not in ACTIVATIONS:
        found.append(Problem("model.activation_func", f"{activation!r} must be one of {', '.join(ACTIVATIONS)}"))
    raise_if_any(found)
    values = {**vars(arch), **{n: model[n] for n in CONFIG_FIELDS if n in model and n not in vars(arch)}}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hybrid_override_pattern": arch.hybrid_override_pattern,
        "layers_block_type": [kind_of(letter).huggingface.blocks[0] for letter in arch.hybrid_override_pattern],
        "num_hidden_layers": arch.num_layers,
        **FIXED,
        **{theirs: values[ours] for ours, theirs in CONFIG_FIELDS.items() if values.get(ours) is not None},
        "mlp_hidden_act": ACTIVATIONS[activation],
        "conv_kernel": arch.mamba_conv_kernel,
        "residual_in_fp32": bool(model.get("fp32_residual_connection", False)),
        **token_ids,
    }


def only_problems(model: Mapping[str, Any], reader: str) -> list[Problem]:
    """What a model section says that a NemotronH of `reader` (named in the messages) cannot be."""
    found = [
        Problem(f"model.{name}", f"{model[name]!r} cannot be said in {reader}, which has {value!r}")
        for name, value in ONLY.items()
        if model.get(name, value) != value
    ]
    pattern = model.get("hybrid_override_pattern", "")
    found += [
        Problem("model.hybrid_override_pattern", f"{kind.letter!r} ({kind.words}) cannot be said in {reader}")
        for kind in kinds()
        if kind.huggingface is None and kind.letter in pattern
    ]
    return found + _epsilon_problems("model.layernorm_epsilon", model.get("layernorm_epsilon", EPSILON))


def _epsilon_problems(key: str, value: float) -> list[Problem]:
    words = f"{value} must be {EPSILON}: NemotronH has one for all norms, Megatron's Mamba mixer always has {EPSILON}"
    return [] if value == EPSILON else [Problem(key, words)]
