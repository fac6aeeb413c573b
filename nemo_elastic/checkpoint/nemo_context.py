"""The `model` section and the tokenizer out of a NeMo checkpoint's `context/`, read as data.

NeMo itself rebuilds objects from `io.json`, which names the classes to call: for a checkpoint of strangers that is
code of their choice. Here only numbers, strings and booleans of `SSMConfig`'s own fields are taken, from `model.yaml`
(safe loader) or `io.json`, and our own code builds the configuration from them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config.model_fields import REQUIRED
from ..problems import Problem, ProblemsError
from .tokenizer_files import TOKENIZER_FILE

YAML_FILE, JSON_FILE = "model.yaml", "io.json"
# Fields that say what the model computes; the others belong to a run or a machine.
MODEL_FIELDS = (
    *REQUIRED,
    "kv_channels",
    "seq_length",
    "share_embeddings_and_output_weights",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "seq_len_interpolation_factor",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "qk_layernorm",
    "softmax_scale",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "fp32_residual_connection",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
)
ACTIVATIONS = {
    "megatron.core.activations.squared_relu": "squared_relu",
    "torch.nn.functional.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch.nn.functional.relu": "relu",
}


@dataclass(frozen=True)
class NemoContext:
    """What a checkpoint's context says of the model: `SSMConfig` fields, and where its tokenizer lies (or None)."""

    model: Mapping[str, Any]
    tokenizer: Path | None


def read_nemo_context(checkpoint: str | Path, vocab_size: int) -> NemoContext:
    """The context of a NeMo checkpoint folder.

    Args:
        vocab_size: rows of the checkpoint's embedding: the context knows the tokenizer, not the padding.

    Raises:
        ProblemsError: there is no context, or it holds no hybrid model.
    """
    folder = Path(checkpoint) / "context"
    for name, fields_of in ((YAML_FILE, _from_yaml), (JSON_FILE, _from_json)):
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            continue
        try:
            fields = fields_of(path)
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ProblemsError([Problem(str(path), f"cannot be read ({str(error)[:160]})")]) from error
        model = {n: fields[n] for n in MODEL_FIELDS if _is_plain(fields.get(n))}
        activation = ACTIVATIONS.get(_target(fields.get("activation_func")))
        if activation:
            model["activation_func"] = activation
        if "hybrid_override_pattern" not in model:
            words = (
                "is not of a hybrid Mamba model with model.hybrid_override_pattern; give the model section in --config"
            )
            raise ProblemsError([Problem(str(path), words)])
        return NemoContext({**model, "vocab_size": vocab_size}, _tokenizer(folder))
    words = f"has neither {YAML_FILE} nor {JSON_FILE}; give the model section in --config"
    raise ProblemsError([Problem(str(folder), words)])


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _target(value: Any) -> str:
    return str(value.get("_target_", "")) if isinstance(value, Mapping) else str(value)


def _from_yaml(path: Path) -> Mapping[str, Any]:
    data = yaml.safe_load(path.read_text())
    return data["config"]


def _from_json(path: Path) -> Mapping[str, Any]:
    """Fiddle's JSON: objects by reference; the model's `config` is the one that has a pattern."""
    objects = json.loads(path.read_text())["objects"]
    for entry in objects.values():
        items = {_key(item): item[1] for item in entry.get("items", []) if _key(item)}
        if "hybrid_override_pattern" in items:
            return {name: _json_value(value, objects) for name, value in items.items()}
    raise ValueError("no object has a hybrid_override_pattern")


def _key(item: Any) -> str | None:
    name = item[0] if isinstance(item, list) and item else None
    found = str(name).split("name=")[-1].strip("')\"") if name is not None else ""
    return found or None


def _json_value(value: Any, objects: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and value.get("type") == "leaf":
        return value.get("value")
    if isinstance(value, Mapping) and value.get("type") == "pyref":
        return f"{value.get('module')}.{value.get('name')}"
    return None


def _tokenizer(folder: Path) -> Path | None:
    found = sorted(folder.rglob(TOKENIZER_FILE))
    return found[0].parent if found else None
