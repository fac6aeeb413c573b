"""Where a child first differs from the nested subnet: in its configuration, in a tensor, or in what a layer computes.

Tensors are compared bit by bit in the order of the forward, one at a time, so that the first layer that differs has a
name; hidden states are asked for only where tensors and configuration are the same and the logits are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nemo_elastic.checkpoint.reader import LazyTensor, TensorReader
from nemo_elastic.config.function_fields import ARITHMETIC
from nemo_elastic.config.model_fields import FLAGS
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.architecture import KIND_NAMES
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

# What a child's folder says of the function it computes; sequence length, initialisation and dropout do not.
FUNCTION_FIELDS = (
    "hybrid_override_pattern",
    "kv_channels",
    "normalization",
    "layernorm_zero_centered_gamma",
    *FLAGS,
    *(name for name in ARITHMETIC if name != "fp32_residual_connection"),
)
DEFAULTS = {"normalization": "RMSNorm", **ARITHMETIC}
HIDDEN_TOLERANCE = 1e-4


def configuration_difference(child: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first field of the model section in which a child's function is not the expected one."""
    for name in FUNCTION_FIELDS:
        wanted = expected.get(name, DEFAULTS.get(name))
        got = child.get(name, DEFAULTS.get(name))
        if (wanted or None) != (got or None):
            return f"configuration: {name} is {got!r}, the nested subnet has {wanted!r}"
    return None


def tensor_difference(child: TensorReader, expected: Sequence[LazyTensor], subnet: Subnet, pattern: str) -> str | None:
    """The first tensor, in the order of the forward, whose bits are not the expected ones (cast to the child's dtype).

    Args:
        pattern: the parent's `hybrid_override_pattern`.
    """
    for tensor in expected:
        place = layer_name(tensor.name, subnet, pattern)
        try:
            got = child.read(tensor.name)
        except ProblemsError as error:
            return f"{place}: {error}"
        wanted = tensor.read().to(got.dtype).contiguous()
        if not torch.equal(_bits(got), _bits(wanted)):
            gap = (got.double() - wanted.double()).abs()
            wrong = int((gap != 0).sum()) or "some"
            return f"{place}: {wrong} of {got.numel()} values differ, by up to {float(gap.max()):.3g}"
    return None


def hidden_difference(nested: Sequence[Tensor], child: Sequence[Tensor], subnet: Subnet, pattern: str) -> str:
    """The first layer behind which the normed hidden states `[s, k]` are not the same; else the output layer."""
    for number, (wanted, got) in enumerate(zip(nested, child, strict=True)):
        gap = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not gap <= HIDDEN_TOLERANCE:
            place = layer_name(f"decoder.layers.{number}.", subnet, pattern)
            return f"{place}output differs by {gap:.3g} of its largest value, although every tensor is the same"
    return "output_layer: logits differ, although every tensor and every layer's output is the same"


def layer_name(name: str, subnet: Subnet, pattern: str) -> str:
    """`decoder.layers.2.mlp.linear_fc1.weight (layer 2 of the child, mlp, layer 3 of the parent)`."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name
    layer = subnet.layers[int(parts[2])]
    where = f"(layer {parts[2]} of the child, {KIND_NAMES[pattern[layer]]}, layer {layer} of the parent)"
    return f"{name} {where}" if parts[-1] else f"{name.rstrip('.')} {where} "


@torch.no_grad()
def nested_trace(model: nn.Module, tokens: Tensor, subnet: Subnet) -> list[Tensor]:
    """Final norm of what each layer leaves, `[s, k]` per layer, of the first row: the subnet cut off behind each."""
    layout: ParamLayout = model.layout
    (ids, positions), found = _first_row(model, tokens), []
    for count in range(1, subnet.num_layers + 1):
        plan = hard_plan(layout, replace(subnet, layers=subnet.layers[:count]))
        found.append(model(ids, positions, None, elastic=plan, hidden_only=True)[:, 0].float().cpu())
    return found


@torch.no_grad()
def plain_trace(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The same of a plain model, by hooks."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.decoder.layers]
    try:
        model(*_first_row(model, tokens), None)
    finally:
        for hook in hooks:
            hook.remove()
    return [model.decoder.final_norm(x)[:, 0].float().cpu() for x in kept]


def _first_row(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token and position ids `[1, s]` of the first row, where the model is."""
    ids = tokens[:1].to(next(model.parameters()).device)
    return ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
