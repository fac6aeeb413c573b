"""The configuration to start from for a parent: what `config --from PARENT` writes, and `plan PARENT` shows.

The model itself is left out, as the parent's own files say it. Per dim the sizes are the parent's and a few smaller
ones that its groups and kernels allow; budgets are three quarters and half of the parent, or what the smallest child
can reach.
"""

from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import yaml

from ..config.load import load_config, load_values
from ..config.model_fields import architecture_of
from ..config.parent_files import ParentFiles, folder_of, parent_files
from ..config.parent_hf import adapter_of_model
from ..config.sections import RunConfig
from ..cost.counts import parameters
from ..family import Family, family_of
from ..kinds import dims
from ..kinds.axis import Groups
from ..problems import Problem, ProblemsError
from ..space.blocks import DEPTH_UNITS
from ..space.dims import DEALT_DIMS, DEFAULT_FFN_GROUPS, HIDDEN, KIND_OF_DIM, dim_groups, least_size, parent_size

RATIOS: dict[str, tuple[float, ...]] = {HIDDEN: (1.0, 0.875, 0.75), **{dim.name: dim.ratios for dim in dims()}}
SHALLOWEST, DEPTHS = 0.75, 4  # of the layers; how many smaller depths to offer
LONGEST = 8192  # tokens of a training sample


def starting_configuration(path: str, key: str = "--from") -> str:
    """YAML of a configuration for the parent at `path`, which the user gave as `key`.

    Raises:
        ProblemsError: nothing there, or nothing that describes a model that can be made elastic.
    """
    folder, said = folder_of(path), parent_files(path)
    if said is None:
        words = f"nothing in {path!r} describes a model (config.json, or context/ of a NeMo checkpoint)"
        raise ProblemsError([Problem(key, words)])
    family = _family(path, said)
    sizes = {name: dim.choices for name, dim in family.space.dims.items() if len(dim.choices) > 1}
    for name, of in adapter_of_model(said.model).divides.items():
        if name in sizes:
            own, *less = sizes[name]
            sizes[name] = (own, *(n for n in less if all(size % n == 0 for size in sizes.get(of, ()))))
    pattern = family.architecture.hybrid_override_pattern
    arch, whole = family.architecture, parameters(family.layout, family.space.full_subnet())
    smallest = family.space.subnet(**{name: choices[-1] for name, choices in sizes.items()})
    large, small = _budgets(parameters(family.layout, smallest) / whole)
    length = min(LONGEST, int(said.model.get("seq_length") or LONGEST))
    lines = [
        f"# A family of {folder.resolve().name}: {whole:,} parameters, {arch.num_layers} layers.",
        f"# The model is what {said.file.name} says. `nemo-elastic plan --config THIS` shows what the budgets mean.",
        *([f"# {said.left_out}."] if said.left_out else []),
        f"name: {_word(folder)}",
        "",
        "parent:",
        f"  path: {_quoted(path)}",
        "",
        "elastic:",
        *([f"  depth_unit: {said.depth_unit} # of a mixer and its MLP"] if said.depth_unit != "layer" else []),
        *(f"  {name}: {count} # which divide its sizes" for name, count in _groups(said.model, pattern).items()),
        "  dims: # sizes; the parent's own first",
        *(f"    {name}: {{choices: {list(choices)}}}" for name, choices in sizes.items()),
        "  budgets: # fractions of the parent's parameters; also a number of them, or {kind: memory_gb, value: 12}",
        "    full: 1.0",
        f"    large: {large}",
        f"    small: {small}",
        "",
        "data:",
        "  blend: [] # text, chat: [{path: chat.jsonl, weight: 7}, {path: books/, weight: 3}]; empty: a small corpus",
        "",
        "rank:",
        f"  seq_length: {min(length, 2048)}",
        "  micro_batch_size: 1",
        "",
        "train:",
        "  precision: bf16-mixed",
        "  micro_batch_size: 1",
        "  tensor_model_parallel_size: 1 # and pipeline_model_parallel_size, until it fits",
        "  stages:",
        f"    - {{tokens: 1.0e+9, seq_length: {length}, global_batch_size: 64}}",
    ]
    return "\n".join(lines) + "\n"


def starting_run(path: str) -> RunConfig:
    """`starting_configuration` as a configuration, the parent's model in it.

    Raises:
        ProblemsError: as there.
    """
    text = starting_configuration(path, path)
    said = parent_files(path)
    assert said is not None, "it has a configuration to start from"
    return load_config(None, base={**yaml.safe_load(text), "model": dict(said.model)}).config


def _family(path: str, said: ParentFiles) -> Family:
    model = said.model
    together = adapter_of_model(model).together
    pattern = str(model.get("hybrid_override_pattern"))
    chosen: dict[str, Any] = {
        name: {"choices": list(RATIOS[together.get(name, name)])}
        for name, ratios in RATIOS.items()
        if ratios and KIND_OF_DIM.get(name, pattern[:1]) in pattern
    }
    unit = DEPTH_UNITS[said.depth_unit]
    arch, groups = architecture_of(model), _groups(model, pattern)
    neurons = groups.get("ffn_groups", DEFAULT_FFN_GROUPS)
    steps = dim_groups(arch, Groups(neurons, groups.get("expert_groups", neurons)))
    for name, dim in chosen.items():  # a token meets as many experts as in the parent: a child has no fewer
        full, step, least = parent_size(arch, name), steps[name], least_size(arch, name)
        dim["choices"] = [r for r in dim["choices"] if r == 1.0 or round(r * full / step) * step >= least]
    layers = len(pattern) // unit
    lowest = -int(-layers * SHALLOWEST // 1)
    step = max(1, -int(-(layers - lowest) // DEPTHS))
    chosen["num_layers"] = {"choices": [unit * n for n in (layers, *range(layers - step, lowest - 1, -step))]}
    return family_of(
        load_values(
            {
                "parent": {"path": path},
                "model": dict(model),
                "elastic": {"depth_unit": said.depth_unit, "dims": chosen, **groups},
            }
        )
    )


def _groups(model: Mapping[str, Any], pattern: str) -> dict[str, int]:
    """Fields of `elastic`: fewer groups than usual, where those do not divide what is dealt to them."""
    found: dict[str, int] = {}
    for name, field in DEALT_DIMS.items():
        if KIND_OF_DIM[name] in pattern and isinstance(model.get(name), int) and model[name] > 0:
            found[field] = gcd(found.get(field, DEFAULT_FFN_GROUPS), model[name])
    if found.get("expert_groups") == found.get("ffn_groups"):
        found.pop("expert_groups", None)  # as many as of neurons, where nothing is said
    return {field: count for field, count in found.items() if count != DEFAULT_FFN_GROUPS or field == "expert_groups"}


def _budgets(smallest: float) -> tuple[float, float]:
    """Fractions of a large and a small child, between the parent and the smallest child."""
    if smallest < 0.5:
        return 0.75, 0.5
    return round(smallest + 2 / 3 * (1 - smallest), 2), round(smallest + 1 / 3 * (1 - smallest), 2)


def _word(folder: Path) -> str:
    """A plain word for the run's folder."""
    found = "".join(c if c.isascii() and c.isalnum() else "_" for c in folder.resolve().name.lower()).strip("_")
    return found if found[:1].isalpha() else f"run_{found}"


def _quoted(text: str) -> str:
    """A YAML word that is always a string."""
    return "'" + text.replace("'", "''") + "'"
