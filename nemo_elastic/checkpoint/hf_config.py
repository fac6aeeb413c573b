"""config.json of Hugging Face's NemotronH from a plain model section (`config.parent_hf` reads one).

Written for old and new readers alike: `hybrid_override_pattern` with `num_hidden_layers`, and `layers_block_type`. What
NemotronH cannot say is refused by name.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..architecture import ATTENTION, MAMBA, MLP
from ..config.model_fields import architecture_of
from ..config.parent_hf import ACTIVATIONS, EPSILON, HINTS, SIZES
from ..problems import Problem, raise_if_any

BLOCK_TYPES = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp"}
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
}


def hf_config(model: Mapping[str, Any], dtype: torch.dtype, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json of a plain model section, for old and new readers alike.

    Raises:
        ProblemsError: the model has something that NemotronH cannot say.
    """
    arch = architecture_of(model)
    found = [
        Problem(f"model.{name}", f"{model[name]!r} cannot be said in Hugging Face's NemotronH, which has {value!r}")
        for name, value in ONLY.items()
        if model.get(name, value) != value
    ]
    found += _epsilon_problems("model.layernorm_epsilon", model.get("layernorm_epsilon", EPSILON))
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
        "layers_block_type": [BLOCK_TYPES[kind] for kind in arch.hybrid_override_pattern],
        "num_hidden_layers": arch.num_layers,
        **{theirs: values[ours] for ours, theirs in CONFIG_FIELDS.items() if ours in values},
        "mlp_hidden_act": ACTIVATIONS[activation],
        "mamba_hidden_act": "silu",
        "conv_kernel": arch.mamba_conv_kernel,
        "chunk_size": 128,
        "use_conv_bias": True,
        "use_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": False,
        "use_cache": True,
        **token_ids,
    }


def _epsilon_problems(key: str, value: float) -> list[Problem]:
    words = f"{value} must be {EPSILON}: NemotronH has one for all norms, Megatron's Mamba mixer always has {EPSILON}"
    return [] if value == EPSILON else [Problem(key, words)]
