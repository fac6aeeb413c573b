"""Causal depthwise convolution over time, with an optional SiLU, as plain tensor operations.

    y[c, t] = act(bias[c] + sum_k weight[c, k] * x[c, t - (K - 1) + k]),   x before the start = initial_states or 0

Signature and layout (``[b, d, s]``) are those of causal-conv1d's ``causal_conv1d_fn``, which Megatron's mixer calls.
`depthwise_causal_conv` does the same on ``[b, s, d]``, the layout that the projections produce: there a tap is one
contiguous multiply-add over all channels, and no transpose is needed. Its backward is written out, so that a step
keeps the input and the values before the activation and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ACTIVATIONS = (None, "silu", "swish")


def depthwise_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Convolve ``x`` ``[b, s, d]`` with ``weight`` ``[d, K]``; ``history`` ``[b, K-1, d]`` precedes ``x``."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of None, 'silu', 'swish'")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(compute)
    if history is not None:
        wide = torch.cat([history.to(compute), wide], dim=1)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    y = _DepthwiseCausalConv.apply(wide, weight.to(compute).t(), bias.to(compute), activation is not None)
    return (y if history is None else y[:, history.shape[1] :]).to(x.dtype)


class _DepthwiseCausalConv(torch.autograd.Function):
    """``x`` ``[b, s, d]``, ``taps`` ``[K, d]`` (the last one meets the newest input), ``bias`` ``[d]``."""

    @staticmethod
    def forward(ctx, x, taps, bias, silu):
        length, newest = x.shape[1], taps.shape[0] - 1
        before = torch.addcmul(bias, x, taps[newest])
        for lag in range(1, min(newest + 1, length)):
            before[:, lag:].addcmul_(x[:, : length - lag], taps[newest - lag])
        ctx.silu = silu
        ctx.save_for_backward(x, taps, before if silu else None)
        return F.silu(before) if silu else before

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, taps, before = ctx.saved_tensors
        length, newest = x.shape[1], taps.shape[0] - 1
        if ctx.silu:
            dy = torch.ops.aten.silu_backward(dy, before)
        dx = dy * taps[newest]
        dtaps = torch.zeros_like(taps)
        product = torch.mul(dy, x)
        torch.sum(product, (0, 1), out=dtaps[newest])
        for lag in range(1, min(newest + 1, length)):
            late, early = dy[:, lag:], x[:, : length - lag]
            dx[:, : length - lag].addcmul_(late, taps[newest - lag])
            part = torch.mul(late, early, out=product[:, lag:])
            torch.sum(part, (0, 1), out=dtaps[newest - lag])
        return dx, dtaps, dy.sum((0, 1)), None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve ``x`` ``[b, d, s]`` with ``weight`` ``[d, K]`` and ``bias`` ``[d]``; returns ``[b, d, s]``.

    ``initial_states`` ``[b, d, K-1]`` are the inputs before the first. With ``return_final_states`` the pair
    ``(y, last K-1 inputs [b, d, K-1])`` comes back, the latter copied into ``final_states_out`` if that is given.
    Raises ``ValueError`` for ``seq_idx`` (packed sequences) and for an unknown ``activation``.
    """
    if seq_idx is not None:
        raise ValueError("seq_idx: packed sequences need the CUDA kernels of causal-conv1d; pass one sequence a row")
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out is only written when return_final_states=True")
    history = None if initial_states is None else initial_states.transpose(1, 2)
    y = depthwise_causal_conv(x.transpose(1, 2), weight, bias, history, activation).transpose(1, 2)
    if not return_final_states:
        return y
    kept = weight.shape[1] - 1
    before = x.new_zeros(*x.shape[:2], kept) if initial_states is None else initial_states.to(x.dtype)
    last = torch.cat([before, x], dim=2)[:, :, x.shape[2] :]
    if final_states_out is not None:
        last = final_states_out.copy_(last)
    return y, last


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One token: ``x`` ``[b, d]``; ``conv_state`` ``[b, d, K]``, its last K inputs, is shifted in place."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of None, 'silu', 'swish'")
    conv_state.copy_(torch.cat([conv_state[:, :, 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=-1))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = (conv_state.to(compute) * weight.to(compute)).sum(-1)
    if bias is not None:
        y = y + bias.to(compute)
    return (y if activation is None else F.silu(y)).to(x.dtype)
