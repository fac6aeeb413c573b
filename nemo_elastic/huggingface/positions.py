"""Rotary positions in config.json: `rope_theta` and `rope_scaling` of older writers, `rope_parameters` of newer ones.

    linear   ->  seq_len_interpolation_factor          llama3  ->  rope_scaling_factor and the three beside it

Both spellings are read, and both are written: a reader takes the one that it knows. Other kinds of scaling are other
functions, and refused by the key that says them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..problems import Problem
from .adapter import Model
from .said import Said

BASE = 10000.0  # of transformers' configuration classes, where a file says none
FIELDS = (
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "seq_len_interpolation_factor",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
)
LLAMA3 = {  # ours -> theirs
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_position_embeddings": "original_max_position_embeddings",
}
KINDS = ("default", "linear", "llama3")


def read_rotary(said: Said, percent: float = 1.0) -> dict[str, Any]:
    """Model fields of a family whose heads turn `percent` of their channels."""
    old, new = (_mapping(said, key) for key in ("rope_scaling", "rope_parameters"))
    if old is None or new is None:
        return {}
    theta, turned = (
        said.agreed(_given({key: said.config, f"rope_scaling.{key}": old, f"rope_parameters.{key}": new}))
        for key in ("rope_theta", "partial_rotary_factor")
    )
    if turned is not None and turned != percent:
        said.wrong("partial_rotary_factor", f"{turned!r} must be {percent}: the share of a head that this family turns")
    model = {"position_embedding_type": "rope", "rotary_base": BASE}
    if theta is not None:
        model["rotary_base"] = said.number("rope_theta", theta)
    if percent != 1.0:
        model["rotary_percent"] = percent
    scalings = {
        key: _scaling(said, key, found) for key, found in (("rope_scaling", old), ("rope_parameters", new)) if found
    }
    return model | (said.agreed(scalings) or {})


def write_rotary(model: Model) -> dict[str, Any]:
    """Keys for old and for new readers."""
    theta, scaling = float(model["rotary_base"]), {"rope_type": "default"}
    if model["rope_scaling_factor"] is not None:
        scaling = {"rope_type": "llama3", **{theirs: model[ours] for ours, theirs in LLAMA3.items()}}
    elif model["seq_len_interpolation_factor"] is not None:
        scaling = {"rope_type": "linear", "factor": float(model["seq_len_interpolation_factor"])}
    partial = {} if model["rotary_percent"] == 1.0 else {"partial_rotary_factor": model["rotary_percent"]}
    return {
        "rope_theta": theta,
        "rope_scaling": None if len(scaling) == 1 else scaling,
        "rope_parameters": {"rope_theta": theta, **scaling, **partial},
        **partial,
    }


def rotary_problems(model: Model, percent: float = 1.0) -> list[Problem]:
    """What of a model's positions cannot be said."""
    if model["position_embedding_type"] != "rope":
        words = f"{model['position_embedding_type']!r} cannot be said there: this family has rotary positions"
        return [Problem("model.position_embedding_type", words)]
    found = []
    if model["rotary_percent"] != percent:
        words = f"{model['rotary_percent']} cannot be said there: this family turns {percent} of a head's channels"
        found.append(Problem("model.rotary_percent", words))
    if model["rope_scaling_factor"] is not None and model["seq_len_interpolation_factor"] is not None:
        words = "cannot be said there beside model.rope_scaling_factor: config.json has one kind of scaling"
        found.append(Problem("model.seq_len_interpolation_factor", words))
    return found


def _mapping(said: Said, key: str) -> Mapping[str, Any] | None:
    value = said.config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        said.wrong(key, f"{str(value)[:60]!r} must be a mapping, or null")
        return None
    if any(isinstance(v, Mapping) for v in value.values()):
        said.wrong(key, "has positions of their own for some layers; only one kind for all layers is supported")
        return None
    return value


def _given(places: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = {key: place.get(key.rsplit(".", 1)[-1]) for key, place in places.items()}
    return {key: value for key, value in found.items() if value is not None}


def _scaling(said: Said, key: str, found: Mapping[str, Any]) -> dict[str, Any]:
    kind = found.get("rope_type", found.get("type"))
    if kind is None and "factor" in found:
        said.wrong(key, "has a factor and no rope_type: say which scaling it is of, or remove it")
    kind = "default" if kind is None else kind
    if kind not in KINDS:
        said.wrong(key, f"{kind!r} must be one of {', '.join(KINDS)}: other scalings of positions are not supported")
    if kind == "linear":
        return {"seq_len_interpolation_factor": said.number(f"{key}.factor", found.get("factor"))}
    if kind != "llama3":
        return {}
    length = found.get("original_max_position_embeddings", said.config.get("max_position_embeddings"))
    values = {**found, "original_max_position_embeddings": length}
    model = {ours: said.number(f"{key}.{theirs}", values.get(theirs)) for ours, theirs in LLAMA3.items()}
    last = "rope_original_max_position_embeddings"
    return model | {last: None if model[last] is None else int(model[last])}
