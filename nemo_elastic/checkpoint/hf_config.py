"""config.json of Hugging Face's NemotronH from a plain model section, and the model section from a config.json.

Written for old and new readers alike: `hybrid_override_pattern` with `num_hidden_layers`, and `layers_block_type`. What
NemotronH cannot say, and what this package cannot make elastic, is refused by name. Every key that decides what is
computed is written, the fixed ones too: a default left to a reader is a default that it may not share.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..architecture import ATTENTION, MAMBA, MLP
from ..config.model_fields import architecture_of, model_problems
from ..problems import Problem, ProblemsError, raise_if_any

BLOCK_TYPES = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp"}
# Older spellings of the list that transformers has written.
KIND_OF_BLOCK = {name: kind for kind, name in BLOCK_TYPES.items()} | {"mamba": MAMBA, "attention": ATTENTION}
# model section <- config.json, where the value is the same.
CONFIG_FIELDS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "vocab_size": "vocab_size",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "layernorm_epsilon": "layer_norm_epsilon",
    "seq_length": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
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
# Megatron has this fixed in the mixer's norm; NemotronH has one epsilon for all norms, so only this one means the same.
EPSILON = 1e-5
# The step of the scan is softplus(dt + dt_bias), unclamped, in Megatron's kernels. transformers' prefill (not its
# decode) raises it to `time_step_min`, other readers clamp it to `time_step_limit`; these do nothing to any step that
# matters, and 0 and infinity are no choice: the first has no logarithm, the second is no JSON.
NO_STEP_BELOW, NO_STEP_ABOVE = 1e-30, 1e30
# What a NemotronH out of Megatron always is.
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
ACTIVATIONS = {"squared_relu": "relu2", "relu": "relu", "gelu": "gelu", "silu": "silu"}


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
        "layers_block_type": [BLOCK_TYPES[kind] for kind in arch.hybrid_override_pattern],
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
    return found + _epsilon_problems("model.layernorm_epsilon", model.get("layernorm_epsilon", EPSILON))


def model_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model section that a NemotronH config.json describes.

    Raises:
        ProblemsError: another kind of model, or one with parts that cannot be elastic here.
    """
    if config.get("model_type") != "nemotron_h":
        words = f"{config.get('model_type')!r} must be 'nemotron_h': no hybrid Mamba-attention model of this family"
        raise ProblemsError([Problem("config.json: model_type", words)])
    pattern = config.get("hybrid_override_pattern")
    blocks = config.get("layers_block_type") or config.get("layer_types")
    if blocks is not None:
        listed = "".join(KIND_OF_BLOCK.get(block, "E") for block in blocks)
        if pattern is not None and pattern != listed:
            words = f"{pattern} says other layers than layers_block_type, {listed}; one of them is stale"
            raise ProblemsError([Problem("config.json: hybrid_override_pattern", words)])
        pattern = listed
    model = {ours: config[theirs] for ours, theirs in CONFIG_FIELDS.items() if config.get(theirs) is not None}
    if "kv_channels" not in model and config.get("attention_head_dim") is not None:
        model["kv_channels"] = config["attention_head_dim"]  # as the first NemotronH configurations name it
    model["hybrid_override_pattern"] = pattern
    activation = {theirs: ours for ours, theirs in ACTIVATIONS.items()}.get(config.get("mlp_hidden_act", "relu2"))
    model["activation_func"] = activation
    switches = ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")
    found = [
        Problem(f"config.json: {n}", "true: parameters that no row of the table has") for n in switches if config.get(n)
    ]
    if activation is None:
        found.append(Problem("config.json: mlp_hidden_act", f"{config['mlp_hidden_act']!r} is not supported"))
    found += _epsilon_problems("config.json: layer_norm_epsilon", config.get("layer_norm_epsilon", EPSILON))
    if config.get("conv_kernel", 4) != 4:
        found.append(Problem("config.json: conv_kernel", f"{config['conv_kernel']} must be 4, as Megatron has it"))
    if isinstance(model.get("ffn_hidden_size"), list):
        words = "is a list: a parent needs one size for all MLP layers"
        raise ProblemsError([*found, Problem("config.json: intermediate_size", words)])
    raise_if_any([*found, *model_problems(model)])
    return model


def _epsilon_problems(key: str, value: float) -> list[Problem]:
    words = f"{value} must be {EPSILON}: NemotronH has one for all norms, Megatron's Mamba mixer always has {EPSILON}"
    return [] if value == EPSILON else [Problem(key, words)]
