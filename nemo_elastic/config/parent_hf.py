"""The `model` section that a `config.json` of Hugging Face's NemotronH describes.

Every key that decides what the model computes is either taken over, or must have the one value that Megatron's hybrid
stack has; another value is refused by the file and its key. `time_step_min`, `time_step_max` and `time_step_floor` are
values of initialisation: accepted, never applied (the kernels that train and serve this family do not clamp the step).
No torch here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kinds import kinds, kinds_of, sizes
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import layers_with
from .model_fields import model_problems

_BLOCKS = {kind.letter: kind.huggingface.blocks for kind in kinds() if kind.huggingface}
KIND_OF_BLOCK = {
    **{today: letter for letter, (today, *_) in _BLOCKS.items()},
    "moe": "E",
    **{older: letter for letter, (_, *rest) in _BLOCKS.items() for older in rest},
}
# Model field <- keys of config.json with the same value, today's first.
SIZES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size",),
    **{size.name: size.huggingface for size in sizes() if size.huggingface},
    "vocab_size": ("vocab_size",),
}
# What a run may use or not; none of it changes what the trained model computes.
HINTS = {
    "seq_length": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
}
ACTIVATIONS = {"squared_relu": "relu2", "relu": "relu", "gelu": "gelu", "silu": "silu"}
# Megatron has this fixed in the mixer's norm; NemotronH has one epsilon for all norms, so only this one means the same.
EPSILON = 1e-5
# Keys with the values that mean the same in Megatron (the first where config.json does not say), and why no other does.
ONE_VALUE: dict[tuple[str, ...], tuple[tuple[Any, ...], str]] = {
    ("layer_norm_epsilon", "rms_norm_eps"): (
        (EPSILON,),
        f"NemotronH has one for all norms, Megatron's Mamba mixer always has {EPSILON}",
    ),
    ("mamba_hidden_act",): (("silu", "swish"), "Megatron's Mamba mixer has no other activation of its convolution"),
    ("conv_kernel", "mamba_d_conv"): ((4,), "as Megatron has it"),
    ("use_conv_bias", "mamba_conv_bias"): ((True,), "Megatron's convolution always has a bias"),
    ("use_bias",): ((False,), "parameters that no row of the table has"),
    ("mlp_bias",): ((False,), "parameters that no row of the table has"),
    ("attention_bias",): ((False,), "parameters that no row of the table has"),
    ("mamba_proj_bias",): ((False,), "parameters that no row of the table has"),
    ("sliding_window",): ((None,), "attention sees everything before a token"),
    ("num_nextn_predict_layers",): ((0, None), "multi-token prediction is not supported yet"),
    ("quantization_config",): ((None,), "quantized weights cannot be pruned or trained; give the bf16 folder"),
}
NO_STEP_BELOW, NO_STEP_ABOVE = 1e-30, 1e30  # a clamp to these is none: no step of the scan gets there


def model_from_hf(config: Any, file: str | Path = "config.json") -> dict[str, Any]:
    """The model section; `file` is what problems name.

    Raises:
        ProblemsError: another kind of model, or one that computes what cannot be run or made elastic here.
    """
    if not isinstance(config, Mapping):
        raise ProblemsError([Problem(str(file), f"{str(config)[:40]!r} must be a mapping: no config.json of a model")])
    if config.get("model_type") != "nemotron_h":
        words = f"{config.get('model_type')!r} must be 'nemotron_h': no hybrid Mamba-attention model of this family"
        raise ProblemsError([Problem(f"{file}: model_type", words)])
    found: list[Problem] = []
    model: dict[str, Any] = {"hybrid_override_pattern": _pattern(config, file, found)}
    for ours, names in SIZES.items():
        size = _said(config, names, file, found)
        if ours == "num_query_groups" and size is None and names[0] in config:
            size = config.get("num_attention_heads")  # null: every query head has its own key head
        if isinstance(size, list):
            words = "is a list: a parent needs one size for all layers of a kind"
            found.append(Problem(f"{file}: {names[0]}", words))
        elif not isinstance(size, int) or isinstance(size, bool) or size < 1:
            words = "is not given" if size is None else f"{size!r} must be a positive integer"
            found.append(Problem(f"{file}: {names[0]}", words))
        model[ours] = size
    tied = _said(config, ("tie_word_embeddings",), file, found)
    if tied is not None and not isinstance(tied, bool):
        found.append(Problem(f"{file}: tie_word_embeddings", f"{tied!r} must be true or false"))
    model["share_embeddings_and_output_weights"] = bool(tied)
    act = config.get("mlp_hidden_act", "relu2")
    model["activation_func"] = (
        {theirs: ours for ours, theirs in ACTIVATIONS.items()}.get(act) if isinstance(act, str) else None
    )
    if model["activation_func"] is None:
        words = f"{act!r} is not supported; only {', '.join(ACTIVATIONS.values())}"
        found.append(Problem(f"{file}: mlp_hidden_act", words))
    model |= {"layernorm_epsilon": EPSILON, "softmax_scale": None}
    found += _other_functions(config, file)
    for ours, theirs in HINTS.items():
        if (value := config.get(theirs)) is not None:
            if isinstance(value, bool) or not isinstance(value, int if ours == "seq_length" else int | float):
                found.append(Problem(f"{file}: {theirs}", f"{value!r} must be a number"))
            model[ours] = value
    raise_if_any(found)
    raise_if_any(Problem(_key(p.key, file), p.message) for p in model_problems(model))
    return model


def keys_of_hf() -> dict[str, str]:
    """Model field -> the key of config.json that says it."""
    named = {ours: names[0] for ours, names in SIZES.items()} | HINTS
    return named | {
        "hybrid_override_pattern": "hybrid_override_pattern or layers_block_type",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
        "activation_func": "mlp_hidden_act",
        "layernorm_epsilon": "layer_norm_epsilon",
    }


def _key(key: str, file: str | Path) -> str:
    field = key.removeprefix("model.")
    return f"{file}: {keys_of_hf().get(field, field)}"


def _said(config: Mapping[str, Any], names: tuple[str, ...], file: str | Path, found: list[Problem]) -> Any:
    """What the given ones of several names of one thing say; None for nothing."""
    given = {name: config[name] for name in names if config.get(name) is not None}
    first = next(iter(given.values()), None)
    for name, value in given.items():
        if value != first:
            words = f"{value!r} says another value than {next(iter(given))}, {first!r}; one of them is stale"
            found.append(Problem(f"{file}: {name}", words))
    return first


def _pattern(config: Mapping[str, Any], file: str | Path, found: list[Problem]) -> str | None:
    key, pattern = f"{file}: hybrid_override_pattern", config.get("hybrid_override_pattern")
    blocks = _said(config, ("layers_block_type", "layer_types"), file, found)
    if blocks is not None:
        known = isinstance(blocks, list) and all(isinstance(b, str) and b in KIND_OF_BLOCK for b in blocks)
        if not known:
            words = f"{str(blocks)[:80]} must be a list of {', '.join(KIND_OF_BLOCK)}"
            found.append(Problem(f"{file}: layers_block_type", words))
            return None
        listed = "".join(KIND_OF_BLOCK[block] for block in blocks)
        if pattern is not None and pattern != listed:
            found.append(Problem(key, f"{pattern} says other layers than layers_block_type, {listed}; one is stale"))
        pattern = listed
    if isinstance(pattern, str):
        for kind in kinds_of(pattern):
            if kind.huggingface is None:
                words = f"{layers_with(pattern, kind.letter)}: {kind.words} is not read from Hugging Face folders yet"
                found.append(Problem(key, words))
                return None
    if not isinstance(pattern, str) or not pattern:
        words = "is not given, nor layers_block_type" if pattern is None else f"{pattern!r} must be a string of letters"
        found.append(Problem(key, words))
        return None
    layers = config.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        words = f"{layers!r} says another depth than the {len(pattern)} layers of {pattern}; one of them is stale"
        found.append(Problem(f"{file}: num_hidden_layers", words))
    return pattern


def _other_functions(config: Mapping[str, Any], file: str | Path) -> list[Problem]:
    """Keys whose value makes another function of the same tensors."""
    found = []
    for names, (allowed, why) in ONE_VALUE.items():
        for name in names:
            if name in config and not any(_same(config[name], value) for value in (*allowed, None)):
                value = "" if name == "quantization_config" else f"{config[name]!r} "
                found.append(Problem(f"{file}: {name}", f"{value}must be {_word(allowed[0])}: {why}"))
    for name in ("time_step_limit", "mamba_dt_limit"):
        if config.get(name) is not None and not _is_no_limit(config[name]):
            words = f"{config[name]!r} must be (0, inf): Megatron's kernels do not clamp the step"
            found.append(Problem(f"{file}: {name}", words))
    return found


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) is isinstance(b, bool)


def _word(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, repr(value)) if not value else repr(value).lower()


def _is_no_limit(limit: Any) -> bool:
    """Infinity is no JSON: it is met as a word, and as transformers' `{"__float__": "Infinity"}`."""
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        return False
    try:
        low, high = (float(v["__float__"] if isinstance(v, Mapping) else v) for v in limit)
    except (KeyError, TypeError, ValueError):
        return False
    return 0 <= low <= NO_STEP_BELOW and high >= NO_STEP_ABOVE
