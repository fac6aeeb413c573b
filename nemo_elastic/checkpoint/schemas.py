"""Children whose layers differ, for readers that know one size, a list of sizes, or sizes per layer.

| schema | says | read by |
|---|---|---|
| `uniform` | one size for all: neurons (of experts too) and query heads are padded with zeros | everything |
| `list` | `intermediate_size` as a list, one entry per MLP layer | vLLM |
| `per_layer_config` | any of the sizes, by layer number | the configuration of transformers 5 |

Padding is lossless: a zero neuron gives relu(0)^2 = 0 (any activation with f(0) = 0), and a query head whose output
columns are zero adds nothing whatever it attends to. Padded Mamba heads would change the mean square in the gated
group norm, so Mamba heads are refused instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cost.counts import parameters
from ..kinds import dims
from ..kinds import sizes as sizes_of_kinds
from ..problems import Problem, ProblemsError, raise_if_any
from ..space.architecture import KIND_NAMES, Architecture
from ..space.dims import KIND_OF_DIM
from ..space.layout import ParamLayout
from ..space.slicing import scatter
from ..space.subnet import Subnet, layer_sizes
from .extract import child_architecture, child_pattern, child_tensors, per_layer_dims
from .reader import LazyTensor, TensorReader

SCHEMAS = ("uniform", "list", "per_layer_config")
CAN_VARY = {schema: tuple(dim.name for dim in dims() if schema in dim.schemas) for schema in SCHEMAS}
WHY = {
    "uniform": "padding Mamba heads with zeros would change the gated norm of the others",
    "list": "the list schema has one size per MLP layer and none for other layers",
    "per_layer_config": "no reader knows it",
}
WHY_OF = {"num_moe_experts": "a mixture there has one number of experts for all layers"}
_VARYING = {dim.name for dim in dims() if dim.schemas}
HF_FIELDS = {size.name: size.huggingface[0] for size in sizes_of_kinds() if size.name in _VARYING}


@dataclass(frozen=True)
class PlainChild:
    """A child as a plain model: its largest sizes, its tensors, what its config.json says beside them, and the cost.

    `padding` counts parameters that only fill up (zeros).
    """

    architecture: Architecture
    layout: ParamLayout
    tensors: list[LazyTensor]
    config: Mapping[str, Any]
    padding: int


def plain_child(
    reader: TensorReader,
    layout: ParamLayout,
    subnet: Subnet,
    *,
    schema: str = "uniform",
    dtype: torch.dtype | None = None,
) -> PlainChild:
    """A child, uniform or not, under a schema.

    Raises:
        ProblemsError: an unknown schema, or naming each dim that the schema cannot vary per layer.
    """
    if schema not in SCHEMAS:
        raise ProblemsError([Problem("--hf-schema", f"{schema!r} must be one of {', '.join(SCHEMAS)}")])
    parent, varied = layout.architecture, per_layer_dims(layout.architecture, subnet)
    raise_if_any(
        Problem(
            "--hf-schema",
            f"{schema} cannot say {name} per layer ({_few(sizes)}): {WHY_OF.get(name, WHY[schema])}; {_remedy(name)}",
        )
        for name, sizes in varied.items()
        if name not in CAN_VARY[schema]
    )
    largest = largest_architecture(parent, subnet)
    own = ParamLayout(largest, ffn_groups=layout.groups)
    tensors = child_tensors(reader, layout, subnet, dtype)
    if not varied:
        return PlainChild(largest, own, tensors, {}, 0)
    if schema != "uniform":
        return PlainChild(largest, own, tensors, _config(schema, parent, subnet, varied), 0)
    kept = [layer_sizes(parent, subnet, layer) for layer in subnet.layers]
    padded = [_pad(tensor, own, kept) for tensor in tensors]
    whole = sum(spec.numel({}) for spec in own.table.values())
    return PlainChild(largest, own, padded, {}, whole - parameters(layout, subnet))


def largest_architecture(architecture: Architecture, subnet: Subnet) -> Architecture:
    """The child's sizes, and per kind of layer the largest of those that differ."""
    most: dict[str, int] = {}
    for layer in subnet.layers:
        for name, size in layer_sizes(architecture, subnet, layer).items():
            most[name] = max(size, most.get(name, 0))
    uniform = {name: tuple(most[name] for _ in getattr(subnet, name)) for name in HF_FIELDS if name in most}
    return child_architecture(architecture, replace(subnet, **uniform))


def _pad(tensor: LazyTensor, own: ParamLayout, sizes: list[dict[str, int]]) -> LazyTensor:
    spec = own.table[tensor.name]
    shape = tuple(spec.shape({}))
    if spec.layer is None or shape == tensor.shape:
        return tensor
    kept = sizes[spec.layer]

    def read() -> torch.Tensor:
        return scatter(tensor.read(), spec, kept, torch.zeros(shape, dtype=tensor.dtype))

    return LazyTensor(tensor.name, tensor.dtype, shape, read)


def _config(
    schema: str, architecture: Architecture, subnet: Subnet, varied: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    if schema == "list":
        return {HF_FIELDS[name]: list(sizes) for name, sizes in varied.items()}
    pattern, per_layer = child_pattern(architecture, subnet), {}
    for name, sizes in varied.items():
        positions = [i for i, kind in enumerate(pattern) if kind == KIND_OF_DIM[name]]
        for position, size in zip(positions, sizes, strict=True):
            per_layer.setdefault(str(position), {})[HF_FIELDS[name]] = size
    return {"per_layer_config": per_layer}


def _few(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes[:6])) + (", ..." if len(sizes) > 6 else "")


def _remedy(name: str) -> str:
    kind = KIND_NAMES[KIND_OF_DIM[name]]
    trained = f"train {kind} layers with elastic.dims.{name}.per_layer=false"
    other = next((schema for schema in reversed(SCHEMAS) if name in CAN_VARY[schema]), None)
    return f"give --hf-schema {other}, or {trained}" if other else trained
