"""The `model` section: NeMo `SSMConfig` field names, known without importing NeMo, and what those cannot say.

`assets/ssm_config_fields.json` lists them (a test compares it with the installed NeMo).
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..kinds import flags, kinds, sizes
from ..problems import Problem, ProblemsError, did_you_mean
from ..space.architecture import Architecture, pattern_problems
from .function_fields import ARITHMETIC, OWN, arithmetic_of, arithmetic_problems

_FIELDS_FILE = Path(__file__).resolve().parent.parent / "assets" / "ssm_config_fields.json"
REQUIRED = (
    "hybrid_override_pattern",
    "hidden_size",
    *(size.name for size in sizes() if size.required),
    "vocab_size",
)
# What a kind that the pattern has no layer of is said to be like, where nobody says it: nothing is built of it.
ABSENT = 1
# Of the kinds of layer, what a model section may leave out: kv_channels follows from others as in Megatron.
OPTIONAL = tuple(size.name for size in sizes() if not size.required and not size.fixed)
# What the one parameter table describes; another value would be counted, cut and exported wrongly.
ONLY: dict[str, Any] = {
    "normalization": "RMSNorm",
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "heterogeneous_block_specs": False,
    "layernorm_zero_centered_gamma": False,
    "glu_linear_offset": 0.0,
    "moe_apply_probs_on_input": False,
    "moe_aux_loss_coeff": 0.0,
    "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None,
    "moe_layer_freq": 1,
    "moe_router_force_load_balancing": False,
    "moe_router_group_topk": None,  # experts would have to stay in their routing groups
    "moe_router_num_groups": None,
    "moe_router_topk_limited_devices": None,
    "moe_shared_expert_gate": False,
    "moe_token_dropping": False,
    "moe_z_loss_coeff": None,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "window_size": None,
}
FLAGS = ("share_embeddings_and_output_weights", *flags())
FUNCTION = (*REQUIRED, *OPTIONAL, *FLAGS, *ARITHMETIC)


@lru_cache(maxsize=1)
def known_fields() -> frozenset[str]:
    """Every field name of `SSMConfig`, `vocab_size`, which NeMo derives from the tokenizer, and what it cannot say."""
    return frozenset((*json.loads(_FIELDS_FILE.read_text())["fields"], "vocab_size", *OWN))


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
    found += arithmetic_problems(model)
    found += [
        Problem(f"model.{size}", f"{model[size]!r} is of {kind.words}, of which the pattern has no layer; remove it")
        for kind in kinds()
        for size in (size.name for size in kind.sizes if size.none_if_absent)
        if model.get(size)
        and isinstance(pattern := model.get("hybrid_override_pattern"), str)
        and kind.letter not in pattern
    ]
    required = required_of(model)
    found += [Problem(f"model.{name}", "is required") for name in required if model.get(name) is None]
    if any(p.key in {f"model.{name}" for name in required} for p in found):
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


def required_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that this model section has to give: not the sizes of kinds that its pattern has no layer of."""
    pattern = model.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        return REQUIRED
    of_others = {size.name for kind in kinds() if kind.letter not in pattern for size in kind.sizes}
    return tuple(name for name in REQUIRED if name not in of_others)


def architecture_of(model: Mapping[str, Any]) -> Architecture:
    """The sizes that the `model` section describes; kv_channels defaults as Megatron's does.

    Raises:
        ProblemsError: with every illegal value.
    """
    given = {name: ABSENT if model.get(name) is None else model[name] for name in REQUIRED}
    given |= {name: model[name] for name in OPTIONAL if model.get(name) is not None}
    if "kv_channels" not in given:
        hidden, heads = given["hidden_size"], given["num_attention_heads"]
        ints = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (hidden, heads))
        if not ints or hidden % heads:
            words = f"is missing and {hidden!r} is no multiple of {heads!r} attention heads; give it"
            raise ProblemsError([Problem("model.kv_channels", words)])
        given["kv_channels"] = hidden // heads
    given |= {name: model[name] for name in FLAGS if model.get(name) is not None}
    return Architecture(**given)


def whole_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model section with everything that it leaves out: sizes, flags and the rest of the function.

    Raises:
        ProblemsError: with every illegal value.
    """
    return {**model, **arithmetic_of(model), **vars(architecture_of(model))}
