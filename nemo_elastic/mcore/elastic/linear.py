"""Linear layers and small parameters cut to a subnet, with gradients that cost what the subnet costs.

    y = x @ take(W)^T,   dW[kept] += dy^T x

The backward adds into the kept slice of Megatron's gradient buffer (`weight.main_grad`) when there is one, so that
no zero-filled tensor of the parent's size is ever made; without a buffer (plain autograd) it returns the full-size
gradient with zeros outside the kept part. The compact weight is cut anew in the backward rather than kept alive.
Communication is Megatron's own: copy / gather in front of a column-parallel, reduce / reduce-scatter behind a
row-parallel linear.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from ...space.layout import ParamSpec
from ...space.slicing import accumulate, is_whole, take

Sizes = Mapping[str, int]


def _deliver(weight: Tensor, gradient: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor | None:
    """Add a cut gradient to the buffer, or return it at full size where there is no buffer."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is not None:
        accumulate(gradient, spec, sizes, buffer)
        return None
    return accumulate(gradient, spec, sizes, torch.zeros_like(weight))


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
        x = x.contiguous()  # of a transposed [s, b, k] torch would make s small products instead of one
        ctx.save_for_backward(x, weight)
        ctx.spec, ctx.sizes = spec, sizes
        return F.linear(x, take(weight, spec, sizes))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        dx = flat.mm(take(weight, ctx.spec, ctx.sizes)).view_as(x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dw = flat.t().mm(x.view(-1, x.shape[-1]))
        return dx, _deliver(weight, dw, ctx.spec, ctx.sizes), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.spec, ctx.sizes = spec, sizes
        return take(weight.detach(), spec, sizes).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return _deliver(ctx.saved_tensors[0], gradient, ctx.spec, ctx.sizes), None, None


def taken(weight: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
    """A small parameter cut to a subnet (norm weights, convolution, A, D, dt bias)."""
    return weight if is_whole(spec, sizes) else _Take.apply(weight, spec, sizes)


class _TakeView(_Take):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.spec, ctx.sizes = spec, sizes
        return take(weight.detach(), spec, sizes)


def taken_view(weight: Tensor, spec: ParamSpec, sizes: Sizes) -> Tensor:
    """A large parameter cut to a subnet: a view where the cut is a prefix. For products that take strides."""
    return weight if is_whole(spec, sizes) else _TakeView.apply(weight, spec, sizes)


def column_parallel(
    module: nn.Module,
    x: Tensor,
    spec: ParamSpec,
    sizes: Sizes,
    *,
    sequence_parallel: bool,
    tp_group: Any,
    weight: Any = None,
    bias: ParamSpec | None = None,
) -> Tensor:
    """A column-parallel linear cut to `sizes`: `[s, b, k_in]` (`[s/tp, ...]`) -> `[s, b, k_out/tp]`, bias and all.

    `weight` replaces the module's own (tied embeddings); `bias` is the row of its bias, where it has one. A module that
    gathers its output does so here too.
    """
    if is_whole(spec, sizes):
        y, left = module(x) if weight is None else module(x, weight=weight)
        return y if left is None else y + left
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=tp_group)
    else:
        x = copy_to_tensor_model_parallel_region(x, group=tp_group)
    y = _SlicedLinear.apply(x, module.weight if weight is None else weight, spec, sizes)
    y = y if bias is None else y + taken(module.bias, bias, sizes)
    return gather_from_tensor_model_parallel_region(y, group=tp_group) if _gathers(module) else y


def _gathers(module: nn.Module) -> bool:
    return bool(getattr(module, "gather_output", False))


def row_parallel(
    module: nn.Module,
    x: Tensor,
    spec: ParamSpec,
    sizes: Sizes,
    *,
    sequence_parallel: bool,
    tp_group: Any,
    bias: ParamSpec | None = None,
) -> Tensor:
    """A row-parallel linear cut to `sizes`: `[s, b, k_in/tp]` -> `[s, b, k_out]` (`[s/tp, ...]`), bias and all.

    `bias`: the row of its bias, where it has one; it is added once, behind the sum over ranks.
    """
    if is_whole(spec, sizes):
        y, left = module(x)
        return y if left is None else y + left
    y = _SlicedLinear.apply(x, module.weight, spec, sizes)
    if sequence_parallel:
        y = reduce_scatter_to_sequence_parallel_region(y, group=tp_group)
    else:
        y = reduce_from_tensor_model_parallel_region(y, group=tp_group)
    return y if bias is None else y + taken(module.bias, bias, sizes)
