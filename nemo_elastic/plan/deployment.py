"""Where a model of given sizes may run: tensor and pipeline sizes, FP8, formats. For the parent and for every child.

    TP  divides mamba_num_groups and num_query_groups (then every shard holds whole groups); the vocabulary is padded
    PP  divides the number of layers
    FP8 needs (2 D + 2 G N + m) % 16 == 0 per Mamba layer, and hidden and FFN sizes in multiples of 16

No torch here.
"""

from collections.abc import Mapping
from typing import Any

from ..config.model_fields import architecture_of, whole_model
from ..config.parent_hf import adapter_of_model
from ..huggingface import unsayable
from ..kinds import dims, kind_of, kinds_of
from ..problems import Problem
from ..space.alignment import FP8_MULTIPLE
from ..space.architecture import Architecture
from ..space.dims import HIDDEN, PER_LAYER_DIMS
from ..space.layout import ParamLayout
from ..space.subnet import Subnet, layer_sizes

LARGEST = 16


def deployment(layout: ParamLayout, subnet: Subnet, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Legal parallel sizes (up to 16), whether FP8 linears fit, and what a stock Hugging Face config can say.

    Args:
        model: the parent's model section; None: its sizes and nothing else.
    """
    arch = layout.architecture
    groups = tuple(getattr(arch, name) for kind in kinds_of(arch.hybrid_override_pattern) for name in kind.split_by)
    return {
        "tensor_parallel": [n for n in range(1, LARGEST + 1) if all(g % n == 0 for g in groups)],
        "pipeline_parallel": [n for n in range(1, LARGEST + 1) if subnet.num_layers % n == 0],
        "fp8": not fp8_problems(layout, subnet, ""),
        "hugging_face": hugging_face_note(model or vars(arch), subnet),
    }


def low_precision_problems(model: Mapping[str, Any]) -> list[Problem]:
    """FP8 and FP4 in training: a plan never enters them, and would silently train in bf16."""
    words = "is never entered under a plan, whose sliced products are bf16; remove it (children may be served in FP8)"
    return [Problem(f"model.{name}", f"{model[name]!r} {words}") for name in ("fp8", "fp4") if model.get(name)]


def fp8_problems(layout: ParamLayout, subnet: Subnet, key: str) -> list[Problem]:
    """Sizes that FP8 kernels refuse, each once."""
    arch, found = layout.architecture, {}
    if subnet.hidden_size % FP8_MULTIPLE:
        found[f"hidden_size {subnet.hidden_size}"] = None
    for layer in subnet.layers:
        sizes = layout.sizes(subnet, layer)
        for axis, words in kind_of(arch.hybrid_override_pattern[layer]).fp8.items():
            width = sum(segment.length(sizes) for segment in layout.axes[axis])
            if width % FP8_MULTIPLE:
                found[words.format(width=width, **sizes)] = None
    return [Problem(key, f"{what} must be a multiple of {FP8_MULTIPLE} for FP8") for what in found]


def hugging_face_note(model: Mapping[str, Any], subnet: Subnet) -> str:
    """Whether a stock Hugging Face config can say the child of a parent with this model section, in words."""
    for kind in kinds_of(model["hybrid_override_pattern"]):
        if kind.huggingface is None:
            return f"no: {kind.words} is not written as a Hugging Face folder yet"
    adapter, architecture = adapter_of_model(model), architecture_of(model)
    ragged = [name for name in PER_LAYER_DIMS if not subnet.is_uniform(name)]
    if found := unsayable(adapter, _child(model, architecture, subnet)):
        return f"no: {found[0].key.removeprefix('model.')} {found[0].message}"
    if not ragged:
        return f"loads as {adapter.words}"
    padded = [dim.name for dim in dims() if "uniform" in dim.schemas and dim.name in ragged]
    listed = [dim.name for dim in dims() if "list" in dim.schemas and dim.name in ragged]
    if ragged == padded:
        more = ", or a list for newer readers" if ragged == listed and adapter.depth_unit == "layer" else ""
        return f"per-layer {', '.join(padded)}: padded to uniform without loss{more}"
    return f"per-layer {', '.join(n for n in ragged if n not in padded)}: no stock schema can say it"


def _child(model: Mapping[str, Any], architecture: Architecture, subnet: Subnet) -> dict[str, Any]:
    """The whole model section of a child; of sizes that differ per layer, the largest."""
    pattern, sizes = architecture.hybrid_override_pattern, {HIDDEN: subnet.hidden_size}
    for layer in subnet.layers:
        for name, size in layer_sizes(architecture, subnet, layer).items():
            sizes[name] = max(size, sizes.get(name, 0))
    kept = "".join(pattern[layer] for layer in subnet.layers)
    return {**whole_model(model), **sizes, "hybrid_override_pattern": kept}
