"""A child out of nested weights: which tensors it has, cut by the one table, and the plain model section it is.

    child = take(parent, row, sizes)      for every row of the table that a kept layer has; layers renumbered

Only `layout.child_params` and `slicing.take` decide what is cut, as in the elastic forward, so a child cannot differ
from the subnet that was trained. Tensors are read when a writer asks for them: peak memory is the largest one, twice.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..kinds import dims, kinds_of
from ..kinds import sizes as sizes_of_kinds
from ..problems import Problem, raise_if_any
from ..space.architecture import KIND_NAMES, Architecture
from ..space.dims import KIND_OF_DIM, PER_LAYER_DIMS, WIDTH_DIMS
from ..space.layout import ParamLayout, ParamSpec, is_uncast
from ..space.slicing import take
from ..space.subnet import Subnet, layer_sizes
from .reader import LazyTensor, TensorReader

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def child_tensors(
    reader: TensorReader, layout: ParamLayout, subnet: Subnet, dtype: torch.dtype | None = None
) -> list[LazyTensor]:
    """Every tensor of a child, by canonical name, in the order of the forward; none is read yet.

    Args:
        reader: the nested (or any parent's) weights, described by `layout`.
        dtype: cast to it, but for what is never cast (`Kind.uncast`); None keeps what is stored.
    """
    found = []
    for name, spec, sizes in layout.child_params(subnet):
        kept = reader.dtype(spec.name) if dtype is None or is_uncast(spec) else dtype
        found.append(LazyTensor(name, kept, tuple(spec.shape(sizes)), _Cut(reader, spec, sizes, kept)))
    return found


class _Cut:
    def __init__(self, reader: TensorReader, spec: ParamSpec, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
        self._reader, self._spec, self._sizes, self._dtype = reader, spec, sizes, dtype

    def __call__(self) -> torch.Tensor:
        return take(self._reader.read(self._spec.name), self._spec, self._sizes).to(self._dtype).contiguous()


def per_layer_dims(architecture: Architecture, subnet: Subnet) -> dict[str, tuple[int, ...]]:
    """Dims in which the KEPT layers of a child differ, with their sizes in the child's layer order."""
    found = {}
    for name in PER_LAYER_DIMS:
        kept = [i for i in subnet.layers if architecture.hybrid_override_pattern[i] == KIND_OF_DIM[name]]
        sizes = tuple(layer_sizes(architecture, subnet, layer)[name] for layer in kept)
        if len(set(sizes)) > 1:
            found[name] = sizes
    return found


def child_architecture(architecture: Architecture, subnet: Subnet) -> Architecture:
    """The plain architecture of a child whose layers of one kind are alike.

    Raises:
        ProblemsError: naming each dim in which its layers differ.
    """
    raise_if_any(
        Problem(
            f"elastic.dims.{name}.per_layer",
            f"this child has {_named(sizes)} in its {KIND_NAMES[KIND_OF_DIM[name]]} layers; a plain model "
            f"has one value for all and cannot say that; {_otherwise(name)}train with per_layer: false",
        )
        for name, sizes in per_layer_dims(architecture, subnet).items()
    )
    sizes: dict[str, Any] = {n: getattr(subnet, n) for n in WIDTH_DIMS if n not in PER_LAYER_DIMS}
    for layer in subnet.layers:
        sizes |= layer_sizes(architecture, subnet, layer)
    return replace(architecture, hybrid_override_pattern=child_pattern(architecture, subnet), **sizes)


def child_pattern(architecture: Architecture, subnet: Subnet) -> str:
    """`hybrid_override_pattern` of the kept layers."""
    return "".join(architecture.hybrid_override_pattern[i] for i in subnet.layers)


def child_layout(layout: ParamLayout, subnet: Subnet) -> ParamLayout:
    """The table of a uniform child as a model of its own."""
    return ParamLayout(child_architecture(layout.architecture, subnet), ffn_groups=layout.groups)


def plain_model(model: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The parent's model section with the sizes of `architecture`: pattern and kv_channels explicit, no num_layers."""
    there = {size for kind in kinds_of(architecture.hybrid_override_pattern) for size in kind.sizes}
    fixed = {size.name for size in sizes_of_kinds() if size.fixed or (size.none_if_absent and size not in there)}
    own = {name: value for name, value in vars(architecture).items() if name not in fixed}
    return {**{n: v for n, v in model.items() if n != "num_layers" and n not in fixed}, **own}


def _otherwise(name: str) -> str:
    said = any(dim.name == name and dim.schemas for dim in dims())
    return "give --format hf, or " if said else ""


def _named(sizes: tuple[int, ...]) -> str:
    few = ", ".join(map(str, sizes[:6]))
    return f"{few}, ..." if len(sizes) > 6 else few
