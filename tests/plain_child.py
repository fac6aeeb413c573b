"""The extracted child as a plain Megatron model, with per-layer widths too: no elastic code in it.

A plain config has one width a dim. A child whose layers differ is put together from layers of plain models, each built
with that layer's widths.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pool_elastic import project
from small_parent import child_architecture, child_pattern

from nemo_elastic.mcore.models.build import build_plain_model
from nemo_elastic.mcore.versions import parameter_name
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.dims import KIND_OF_DIM, PER_LAYER_DIMS, WIDTH_DIMS
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.slicing import accumulate, take
from nemo_elastic.space.subnet import Subnet


def plain_child(
    arch: Architecture, subnet: Subnet, function: Mapping[str, Any] | None = None, **more: Any
) -> torch.nn.Module:
    """The child's modules, weights as Megatron initialises them.

    Args:
        function: what a model section says beside the sizes.
        more: fields of the config.
    """

    def build(architecture: Architecture) -> torch.nn.Module:
        return build_plain_model({**vars(architecture), **(function or {})}, **more)

    if all(subnet.is_uniform(n) for n in WIDTH_DIMS):
        return build(child_architecture(arch, subnet))
    layout, built = ParamLayout(arch, ffn_groups=1), {}
    fields = {f: getattr(arch, f) for f in arch.__dataclass_fields__} | {
        "hybrid_override_pattern": child_pattern(arch, subnet),
        "hidden_size": subnet.hidden_size,
        "mamba_head_dim": subnet.mamba_head_dim,
    }
    for number, layer in enumerate(subnet.layers):
        widths = {n: s for n, s in layout.sizes(subnet, layer).items() if n in KIND_OF_DIM and n in PER_LAYER_DIMS}
        built[number] = build(Architecture(**(fields | widths)))
    child = built[0]
    for number, model in built.items():
        child.decoder.layers[number] = model.decoder.layers[number]
    return child


def load_child(child: torch.nn.Module, weights: dict[str, torch.Tensor], layout: ParamLayout, subnet: Subnet) -> None:
    """Copy the kept part of the parent's whole weights."""
    parameters = {parameter_name(name): parameter for name, parameter in child.named_parameters()}
    cut = {name: take(weights[spec.name], spec, sizes) for name, spec, sizes in layout.child_params(subnet)}
    assert cut.keys() == parameters.keys()
    with torch.no_grad():
        for name, value in cut.items():
            assert parameters[name].shape == value.shape, name
            parameters[name].copy_(value)


def extracted(
    arch: Architecture, subnet: Subnet, function: Mapping[str, Any], weights: dict[str, torch.Tensor],
    layout: ParamLayout, ids: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The child's logits, and the gradients of their projection where they lie in the parent's weights; fp64."""
    child = plain_child(arch, subnet, function, params_dtype=torch.float64)
    load_child(child, weights, layout, subnet)
    logits = child(ids, None, None)
    project(logits).backward()
    rows = {row: (spec, sizes) for row, spec, sizes in layout.child_params(subnet)}
    own = {n: torch.zeros_like(w) for n, w in weights.items()}
    for n, p in child.named_parameters():
        if p.requires_grad:
            row = rows[parameter_name(n)]
            accumulate(p.grad, *row, own[row[0].name])
    return logits, own
