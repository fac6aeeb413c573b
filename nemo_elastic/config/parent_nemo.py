"""The `model` section and the tokenizer out of a NeMo checkpoint's `context/`, read as data.

NeMo itself rebuilds objects from `io.json`, which names the classes to call: for a checkpoint of strangers that is
code of their choice. Here only numbers, strings and booleans of `SSMConfig`'s own fields are taken, from `model.yaml`
(safe loader) or `io.json`, and our own code builds the configuration from them. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files import read_json, read_yaml
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import without_prediction
from .function_fields import ROTARY
from .model_fields import FUNCTION, ONLY, model_problems, required_of
from .parent_hf import PREDICTED
from .stored_rows import embedding_rows

CONTEXT_FILES = YAML_FILE, JSON_FILE = "model.yaml", "io.json"
TOKENIZER_FILE = "tokenizer.json"
# Beside the fields that decide the function: what a run of this model starts from. The others belong to a machine.
HINTS = ("seq_length", "hidden_dropout", "attention_dropout", "init_method_std")
ACTIVATIONS = {
    "megatron.core.activations.squared_relu": "squared_relu",
    "nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase.<lambda>": "squared_relu",
    "torch.nn.functional.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch._C._nn.gelu": "gelu",
    "torch.nn.functional.relu": "relu",
}
# Of a context that does not say it, by the class that it names: NeMo's own defaults.
ACTIVATION_OF_CLASS = (("nemotron", "squared_relu"), ("ssmconfig", "gelu"))


@dataclass(frozen=True)
class NemoContext:
    """What a context says of the model (`SSMConfig` fields), the file that does, and its tokenizer folder (or None).

    `left_out`: what of it children are made without, in words.
    """

    model: Mapping[str, Any]
    file: Path
    tokenizer: Path | None
    left_out: str | None = None


def read_nemo_context(checkpoint: str | Path) -> NemoContext:
    """The context of a NeMo checkpoint folder. `vocab_size` is the rows of the stored embedding: the padded size.

    Raises:
        ProblemsError: there is no context, it holds no hybrid model, or one that cannot be run or made elastic here.
    """
    folder = Path(checkpoint) / "context"
    for name, fields_of in ((YAML_FILE, _from_yaml), (JSON_FILE, _from_json)):
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            continue
        try:
            fields = fields_of(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise ProblemsError([Problem(str(path), f"cannot be read ({str(error)[:160]})")]) from error
        fields, predicts = _without_prediction(fields)
        model = _model(fields, path, embedding_rows(Path(checkpoint)))
        return NemoContext(model, path, _tokenizer(folder), f"{path}: {PREDICTED}" if predicts else None)
    words = f"has neither {YAML_FILE} nor {JSON_FILE}; copy the whole checkpoint"
    raise ProblemsError([Problem(str(folder), words)])


def _without_prediction(fields: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the same without multi-token prediction, whether there was some)."""
    pattern = fields.get("hybrid_override_pattern")
    kept = {name: value for name, value in fields.items() if not name.startswith("mtp_")}
    short = without_prediction(pattern)
    return {**kept, "hybrid_override_pattern": short}, short != pattern or bool(fields.get("mtp_num_layers"))


BALANCING = "moe_router_load_balancing_type"  # one of them is another routing
# How a parent with experts was trained; none of it is in the function that it computes.
ONE_GROUP = ("moe_router_num_groups", "moe_router_group_topk")  # of all experts: no routing groups
OF_TRAINING = ("moe_aux_loss_coeff", "moe_input_jitter_eps", "moe_z_loss_coeff")


def _model(fields: Mapping[str, Any], path: Path, rows: int | None) -> dict[str, Any]:
    if "hybrid_override_pattern" not in fields or fields["hybrid_override_pattern"] is None:
        words = "is not of a hybrid Mamba model: it has no hybrid_override_pattern"
        raise ProblemsError([Problem(str(path), words)])
    found: list[Problem] = []
    wanted = [n for n in (*FUNCTION, *ONLY, *HINTS, "num_layers", BALANCING) if n not in OF_TRAINING]
    model = {n: fields[n] for n in wanted if n != "activation_func" and fields.get(n) is not None}
    model = {n: value for n, value in model.items() if n not in ONE_GROUP or value != 1}
    for name in [name for name, value in model.items() if not isinstance(value, bool | int | float | str)]:
        found.append(Problem(f"{path}: {name}", f"{str(model[name])[:80]} is neither a number nor a word"))
    activation = _activation(fields)
    if activation is not None and activation not in ACTIVATIONS.values():
        known = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
        found.append(Problem(f"{path}: activation_func", f"{activation} is not supported; only {known}"))
    model |= {"activation_func": activation} if activation else {}
    raise_if_any(found)
    model |= {name: value for name, value in _defaults(model).items() if name in fields and name not in model}
    model |= {} if rows is None else {"vocab_size": rows}
    if model.get("position_embedding_type", "none") == "none":  # NeMo writes their defaults all the same
        model = {name: value for name, value in model.items() if name not in ROTARY}
    if not model.get("num_moe_experts"):
        model = {name: value for name, value in model.items() if not name.startswith("moe_")}
    if all(
        model.get(name) is not None for name in required_of(model)
    ):  # else the configuration says the rest, and is checked
        raise_if_any(Problem(f"{path}: {p.key.removeprefix('model.')}", p.message) for p in model_problems(model))
    return {name: value for name, value in model.items() if name not in (*ONLY, "num_layers", BALANCING)}


def _defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that Megatron derives from others where they are null."""
    hidden, heads, channels = (model.get(n) for n in ("hidden_size", "num_attention_heads", "mamba_head_dim"))
    found: dict[str, Any] = {}
    if hidden and heads and not hidden % heads:
        found["kv_channels"] = hidden // heads
    if heads:
        found["num_query_groups"] = heads
    if hidden:
        found["ffn_hidden_size"] = 4 * hidden
    if hidden and channels and not 2 * hidden % channels:
        found["mamba_num_heads"] = 2 * hidden // channels
    return found


def _activation(fields: Mapping[str, Any]) -> str | None:
    """A name of ours, or what the file says where we have none; None where the file does not say."""
    value = fields.get("activation_func")
    if value is None:
        kind = str(fields.get("_target_", "")).rpartition(".")[2].replace("_", "").lower()
        return next((name for start, name in ACTIVATION_OF_CLASS if kind.startswith(start)), None)
    target = str(value.get("_target_", value)) if isinstance(value, Mapping) else str(value)
    return ACTIVATIONS.get(target, target)


def _from_yaml(path: Path) -> Mapping[str, Any]:
    config = read_yaml(path)["config"]
    if not isinstance(config, Mapping):
        raise ValueError(f"its config is {str(config)[:40]!r}")
    return config


def _from_json(path: Path) -> Mapping[str, Any]:
    """Fiddle's JSON: objects by reference, each under its class in small letters; ours is the one with a pattern."""
    objects = read_json(path)["objects"]
    for key, entry in objects.items():
        items = {_key(item): item[1] for item in entry.get("items", []) if _key(item)}
        if "hybrid_override_pattern" in items:
            return {"_target_": key, **{name: _json_value(value) for name, value in items.items()}}
    raise ValueError("no object has a hybrid_override_pattern")


def _key(item: Any) -> str | None:
    name = item[0] if isinstance(item, list) and item else None
    found = str(name).split("name=")[-1].strip("')\"") if name is not None else ""
    return found or None


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("type") == "leaf":
        return value.get("value")
    if isinstance(value, Mapping) and value.get("type") == "pyref":
        return f"{value.get('module')}.{value.get('name')}"
    return None


def _tokenizer(folder: Path) -> Path | None:
    found = sorted(folder.rglob(TOKENIZER_FILE))
    return found[0].parent if found else None
