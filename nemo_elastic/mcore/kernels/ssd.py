"""Mamba-2's kernels in pure PyTorch, with the signatures that Megatron's ``MambaMixer`` calls.

    dt' = clamp(softplus(dt + dt_bias), dt_limit)
    h_t = exp(dt'_t A) h_{t-1} + dt'_t x_t B_t^T,     y_t = (h_t C_t + D x_t) * silu(z_t)

Head ``i`` of ``h`` reads group ``i // (h / g)`` of ``B`` and ``C``. Inputs in bf16 or fp16 are computed in fp32, fp64
stays fp64; the output has the dtype of ``x``, states have that of the arithmetic. Arguments of the CUDA kernels that
are not supported raise ``ValueError``. Source: Mamba-2 (arXiv 2405.21060) and the interface of mamba-ssm 2.x.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_elastic.kinds.scan_chunk import scan_chunk_length
from nemo_elastic.mcore.kernels.causal_conv import causal_conv1d_fn, causal_conv1d_update, depthwise_causal_conv
from nemo_elastic.mcore.kernels.chunk_scan import chunk_scan
from nemo_elastic.mcore.kernels.gated_norm import RMSNormGated, gated_rms_norm
from nemo_elastic.mcore.runtime.cpu import has_mamba_kernels

__all__ = [
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "mamba_step",
    "selective_state_update",
]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _refuse(**arguments: object) -> None:
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"{', '.join(given)}: not supported by the pure-PyTorch scan; pass one sequence a row (no packing), "
            "or install mamba-ssm and run on a GPU"
        )


def _discretise(dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt if tuple(limit) == (0.0, math.inf) and softplus else dt.clamp(*limit)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan ``x`` ``[b, s, h, p]``; returns ``y`` ``[b, s, h, p]``, with ``return_final_states`` also ``[b, h, p, n]``.

    ``dt`` ``[b, s, h]``, ``A`` and ``dt_bias`` ``[h]``, ``B`` and ``C`` ``[b, s, g, n]``, ``D`` ``[h]`` or ``[h, p]``,
    ``z`` like ``x``, ``initial_states`` ``[b, h, p, n]``. ``chunk_size`` is the CUDA kernels' tile: the result does not
    depend on it, and this scan takes the chunk length that is fastest here. Raises ``ValueError`` for packed sequences
    and for shapes that do not fit.
    """
    _refuse(seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    heads, groups = x.shape[2], B.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} heads cannot be dealt to {groups} groups: the heads must be a multiple of them")
    if B.shape != C.shape or B.shape[:2] != x.shape[:2] or dt.shape != x.shape[:3] or A.shape != (heads,):
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in dict(x=x, dt=dt, A=A, B=B, C=C).items())
        raise ValueError(f"shapes do not fit x [b, s, h, p], dt [b, s, h], A [h], B and C [b, s, g, n]: {shapes}")
    compute = _compute_dtype(x)
    step = _discretise(dt.to(compute), dt_bias, dt_softplus, dt_limit)
    if D is None:
        D = torch.zeros_like(A)
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    y, final = chunk_scan(
        x.to(compute),
        step,
        step * A.to(compute),
        B.to(compute),
        C.to(compute),
        D.to(compute).view(heads, -1),
        initial_states.to(compute),
        scan_chunk_length(x.shape[1], x.shape[3], B.shape[3]),
    )
    if z is not None:
        y = y * F.silu(z.to(compute))
    y = y.to(x.dtype)
    return (y, final) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """All of a mixer between its projections: split, convolve, scan, gate, norm; optionally the output projection.

    ``zxbcdt`` is ``[b, s, z+x+B+C+dt]`` with widths ``d, d, g n, g n, h``; ``conv1d_weight`` ``[d + 2 g n, K]``; ``D``
    ``[h, p]``, or ``[h]`` and then ``headdim`` is needed. Without ``rmsnorm_weight`` the gate ``silu(z)`` is applied
    and no norm; with it the norm runs per group of ``d / ngroups`` channels. Returns ``[b, s, d]``, or ``[b, s, out]``
    with ``outproj_weight`` ``[out, d]``; with ``return_final_states`` also the states ``[b, h, p, n]``. Raises
    ``ValueError`` for packed sequences and for widths that do not add up.
    """
    _refuse(seq_idx=seq_idx)
    if D.dim() == 1 and headdim is None:
        raise ValueError("D of shape [h] does not tell the head dim: pass headdim")
    heads, headdim = (D.shape[0], headdim) if D.dim() == 1 else D.shape
    width = heads * headdim
    state_width = (zxbcdt.shape[-1] - 2 * width - heads) // 2
    if state_width <= 0 or state_width % ngroups or zxbcdt.shape[-1] != 2 * (width + state_width) + heads:
        raise ValueError(
            f"zxbcdt has {zxbcdt.shape[-1]} channels, which is not 2*{width} + 2*ngroups*state + {heads} "
            f"for {heads} heads of {headdim} and ngroups={ngroups}"
        )
    z, xbc, dt = zxbcdt.split([width, width + 2 * state_width, heads], dim=-1)
    xbc = depthwise_causal_conv(xbc, conv1d_weight, conv1d_bias, activation=activation)
    x, B, C = xbc.split([width, state_width, state_width], dim=-1)
    y, final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_rms_norm(
            y, rmsnorm_weight, z, eps=rmsnorm_eps, group_size=width // ngroups, norm_before_gate=norm_before_gate
        )
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight.to(y.dtype), None if outproj_bias is None else outproj_bias.to(y.dtype))
    return (y, final) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One token, with per-channel steps as Megatron's decode passes them; ``state`` ``[b, h, p, n]`` changes in place.

    ``x``, ``dt``, ``z`` ``[b, h, p]``, ``A`` ``[h, p, n]``, ``B`` and ``C`` ``[b, g, n]``, ``D`` and ``dt_bias``
    ``[h, p]``. Returns ``y`` ``[b, h, p]`` in the dtype of ``x``.
    """
    compute = _compute_dtype(x)
    heads, groups = x.shape[1], B.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} heads cannot be dealt to {groups} groups: the heads must be a multiple of them")
    step = _discretise(dt.to(compute), dt_bias, dt_softplus, (-math.inf, math.inf)).unsqueeze(-1)
    wide = x.to(compute)
    B, C = (t.to(compute).repeat_interleave(heads // groups, dim=1).unsqueeze(2) for t in (B, C))
    new = state.to(compute) * torch.exp(step * A.to(compute)) + step * wide.unsqueeze(-1) * B
    state.copy_(new)
    y = (new * C).sum(-1)
    if D is not None:
        y = y + D.to(compute) * wide
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(x.dtype)


@lru_cache
def step_kernel(device_type: str) -> Callable[..., Tensor] | None:
    """mamba-ssm's `selective_state_update` where it is there."""
    if device_type != "cuda" or not has_mamba_kernels():
        return None
    return importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update


def mamba_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """One token with per-head parameters: ``x`` ``[b, h, p]``, ``dt`` ``[b, h]``, ``A``, ``D``, ``dt_bias`` ``[h]``.

    ``B`` and ``C`` are ``[b, g, n]``; ``state`` ``[b, h, p, n]`` is updated in place. Running it over a sequence gives
    what `mamba_chunk_scan_combined` gives for the whole. On a GPU with mamba-ssm its kernel does it.
    """
    D = D.unsqueeze(-1) if D is not None and D.dim() == 1 else D
    bias = None if dt_bias is None else dt_bias.unsqueeze(-1)
    kernel = step_kernel(x.device.type)
    if kernel is not None:  # it wants every channel's own numbers, and knows by their strides that they are one
        heads, p, n = state.shape[1:]
        A, dt = A[:, None, None].expand(heads, p, n), dt.unsqueeze(-1).expand_as(x)
        D, bias = (None if t is None else t.expand(heads, p) for t in (D, bias))
        return kernel(state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=dt_softplus)
    return selective_state_update(
        state, x, dt.unsqueeze(-1), A[:, None, None], B, C, D, z=z, dt_bias=bias, dt_softplus=dt_softplus
    )
