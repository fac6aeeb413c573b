"""The `model` section that a Hugging Face config.json describes, by the adapter of its family (`huggingface`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..huggingface import Adapter, adapter_for, adapter_of_type, model_of
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import without_prediction
from .model_fields import model_problems, whole_model

PREDICTED = "its blocks of multi-token prediction are left out; children are made without them"


def family_of_hf(config: Any, file: str | Path = "config.json") -> Adapter:
    """The family of a config.json.

    Raises:
        ProblemsError: no mapping, or a `model_type` that nobody knows here.
    """
    if not isinstance(config, Mapping):
        raise ProblemsError([Problem(str(file), f"{str(config)[:40]!r} must be a mapping: no config.json of a model")])
    return adapter_of_type(config.get("model_type"), file)


def model_from_hf(config: Any, file: str | Path = "config.json") -> dict[str, Any]:
    """The model section; `file` is what problems name.

    Raises:
        ProblemsError: another kind of model, or one that computes what cannot be run or made elastic here.
    """
    adapter = family_of_hf(config, file)
    model = model_of(adapter, config, file)
    keys = keys_of_hf(adapter)

    def key(name: str) -> str:
        field = name.removeprefix("model.")
        return f"{file}: {keys.get(field, field)}"

    raise_if_any(Problem(key(p.key), p.message) for p in model_problems(model))
    return model


def left_out_note(config: Mapping[str, Any], file: str | Path = "config.json") -> str | None:
    """What of a parent its children are made without, in words; None: nothing."""
    blocks, pattern = config.get("num_nextn_predict_layers"), config.get("hybrid_override_pattern")
    if not (isinstance(blocks, int) and blocks > 0) and without_prediction(pattern) == pattern:
        return None
    return f"{file}: {PREDICTED}"


def keys_of_hf(adapter: Adapter) -> dict[str, str]:
    """Model field -> the key of config.json that says it."""
    return {**adapter.elsewhere, **adapter.keys()}


def adapter_of_model(model: Mapping[str, Any]) -> Adapter:
    """The family that a model section is of (`huggingface.adapter_for`)."""
    return adapter_for(whole_model(model))
