"""config.json -> model section, and a model section -> config.json, by a family's adapter. No torch here.

Every key that decides what is computed is taken over, or must have the one value that means the same in Megatron;
another one is refused by the file and its key. Written are all of them, the fixed ones too: a default left to a reader
is a default that it may not share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..problems import Problem, raise_if_any
from .adapter import Adapter, Field, Model, Only
from .said import Said

# What a model section can say and no family here has, unless its adapter speaks of it.
PLAIN: dict[str, Any] = {
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
_SEES_ALL = "attention sees everything before a token"
_CAP = "scores and logits are not capped"
_EXPERTS = "models of this family have no experts"
# Keys of no family here, met in forks and relatives of them: with another value they are another function.
_OTHER_FAMILIES = "models of this family have no such part"
FOREIGN = (
    Only(keys=("is_causal",), allowed=(True,), why="attention sees only what is before a token"),
    *(
        Only(keys=(key,), allowed=(None, 0, False), why=_OTHER_FAMILIES)
        for key in (
            "attention_chunk_size",
            "block_configs",
            "kv_lora_rank",
            "lm_head_bias",
            "nope_layer_interval",
            "qk_norm",
        )
    ),
    *(
        Only(keys=(key,), allowed=(1, None), why="nothing is multiplied in models of this family")
        for key in (
            "attention_multiplier",
            "embedding_multiplier",
            "logit_scale",
            "logits_scaling",
            "residual_multiplier",
            "scale_emb",
        )
    ),
    Only(
        keys=("compression_config",), allowed=(None,), why="compressed weights cannot be trained; give the bf16 folder"
    ),
    Only(
        keys=("quantization_config",),
        allowed=(None,),
        why="quantized weights cannot be pruned or trained; give the bf16 folder",
    ),
    *(
        Only(keys=(key,), allowed=(False, None), why=_SEES_ALL)
        for key in ("use_sliding_window", "sliding_window_pattern")
    ),
    *(Only(keys=(key,), allowed=(None, 0), why=_CAP) for key in ("attn_logit_softcapping", "final_logit_softcapping")),
    *(Only(keys=(key,), allowed=(False,), why="no bias of scores by distance") for key in ("alibi", "use_alibi")),
    *(
        Only(keys=(key,), allowed=(False,), why="a layer is added behind the one before it, not beside it")
        for key in ("parallel_attn", "parallel_residual", "use_parallel_residual")
    ),
    *(
        Only(keys=(key,), allowed=(None, 0, []), why=_EXPERTS)
        for key in ("num_experts", "moe_num_experts", "moe_layers", "first_k_dense_replace")
    ),
    Only(
        keys=("num_nextn_predict_layers",), allowed=(None, 0), why="models of this family do not predict further tokens"
    ),
    Only(keys=("clip_qkv",), allowed=(None,), why="queries, keys and values are not clipped"),
    Only(
        keys=("no_rope_layers", "no_rope_layer_interval"),
        allowed=(None, 0, []),
        why="every layer has the same positions",
    ),
)
LARGEST = 1 << 40  # of any size
_WRITTEN = ("size", "hint", "number", "flag", "word")


def model_of(adapter: Adapter, config: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """The model section of a config.json of the adapter's family.

    Raises:
        ProblemsError: it computes what cannot be run or made elastic here; `file` and key of every reason.
    """
    said = Said(config, file)
    model: dict[str, Any] = {"hybrid_override_pattern": adapter.pattern(said)}
    fields = [one for one in adapter.fields if one.when(model)]
    for one in fields:
        model[one.ours] = _read(one, said, model)
    model |= adapter.has
    own = {key for only in adapter.only for key in only.keys} | {key for one in adapter.fields for key in one.keys}
    own |= {adapter.elsewhere[name] for name in adapter.speaks if name in adapter.elsewhere} | set(adapter.handles)
    named = config.get("architectures")
    if isinstance(named, list) and named and adapter.architecture not in named:
        words = f"{named} must hold {adapter.architecture}: a causal language model with its output layer"
        said.wrong("architectures", words)
    for only in (*adapter.only, *(f for f in FOREIGN if not own & set(f.keys))):
        if only.when(model):
            _check(only, said)
    model |= adapter.read(said, model)
    for one in adapter.hints:
        if (value := said.config.get(one.keys[0])) is not None:
            least, most = (1, LARGEST) if one.ours == "seq_length" else (0, math.inf)
            kind, words = (int, "an integer") if least else (int | float, "a number")
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < most:
                said.wrong(one.keys[0], f"{repr(value)[:40]} must be {words} of {least} or more")
            model[one.ours] = value
    raise_if_any(said.problems)
    return model


def config_of(adapter: Adapter, model: Model, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a whole model section (every default filled in), for old and new readers alike.

    Raises:
        ProblemsError: the model has something that the family cannot say.
    """
    raise_if_any(unsayable(adapter, model))
    fields = sorted((*adapter.fields, *adapter.hints), key=lambda one: _WRITTEN.index(one.kind))
    fields = [one for one in fields if one.when(model)]
    return {
        "architectures": [adapter.architecture],
        "model_type": adapter.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        **adapter.layers(model["hybrid_override_pattern"]),
        **{only.keys[0]: only.allowed[0] for only in adapter.only if not only.unsaid},
        **adapter.fixed,
        **{one.keys[0]: _written(one, model[one.ours]) for one in fields if model.get(one.ours) is not None},
        **adapter.write(model),
        **token_ids,
    }


def unsayable(adapter: Adapter, model: Model, reader: str | None = None) -> list[Problem]:
    """What a whole model section says that a model of the family cannot be.

    Args:
        reader: who cannot say it, in the messages; None: Hugging Face's.
    """
    reader = reader or f"Hugging Face's {adapter.words}"
    spoken = {*adapter.keys(), *adapter.speaks}
    wanted = {name: value for name, value in {**PLAIN, **adapter.has}.items() if name not in spoken}
    found = [
        Problem(f"model.{name}", f"{model[name]!r} cannot be said in {reader}, which has {value!r}")
        for name, value in wanted.items()
        if model.get(name, value) != value
    ]
    for one in adapter.fields:
        if one.words and model[one.ours] not in one.words:
            found.append(Problem(f"model.{one.ours}", f"{model[one.ours]!r} must be one of {', '.join(one.words)}"))
    found += adapter.pattern_problems(model["hybrid_override_pattern"], reader)
    return found + adapter.problems(model)


def _written(one: Field, value: Any) -> Any:
    return one.words[value] if one.words else value


def _read(one: Field, said: Said, model: Model) -> Any:
    value = said.value(one.keys)
    if one.derived and (value is None or value == "auto"):
        if (value := one.derived(said, model)) is None:
            return None  # what it follows from is wrong, and noted
    elif value is None and one.null and (one.missing or one.keys[0] in said.config):
        value = model.get(one.null)
    elif value is None and one.default is not None:
        null = one.kind == "size" and one.default and any(key in said.config for key in one.keys)
        if not null:  # else it is refused as no number: its class would not take the default either
            return one.default
    if one.kind == "flag":
        if value is not None and not isinstance(value, bool):
            said.wrong(one.keys[0], f"{value!r} must be true or false")
        return bool(value)
    if one.kind == "word":
        ours = next((name for name, theirs in one.words.items() if theirs == value), None)
        if ours is None:
            said.wrong(one.keys[0], f"{value!r} is not supported; only {', '.join(one.words.values())}")
        return ours
    if one.kind == "number":
        return said.number(one.keys[0], value)
    if isinstance(value, list):
        said.wrong(one.keys[0], "is a list: a parent needs one size for all layers of a kind")
    elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        words = f"{repr(value)[:40]} must be a positive integer of at most {LARGEST}"
        said.wrong(one.keys[0], "is not given" if value is None else words)
        return None
    return value


def _check(only: Only, said: Said) -> None:
    """A key whose value makes another function of the same tensors."""
    for name in only.keys:
        value = said.config.get(name)
        if value is None:
            continue
        if not any(_same(value, allowed) for allowed in only.allowed):
            shown = "" if name == "quantization_config" else f"{value!r} "
            said.wrong(name, f"{shown}must be {_word(only.allowed[0])}: {only.why}")
    if only.default is not None and not any(name in said.config for name in only.keys):
        words = f"is not given, which means {only.default!r}; it must be {_word(only.allowed[0])}: {only.why}"
        said.wrong(only.keys[0], words)


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) is isinstance(b, bool)


def _word(value: Any) -> str:
    return "null" if value is None else repr(value).lower()
