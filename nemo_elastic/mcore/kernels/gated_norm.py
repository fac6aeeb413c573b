"""The grouped, gated RMS norm of a Mamba-2 mixer.

Per group of ``group_size`` channels, with ``rms(v) = sqrt(mean(v^2) + eps)``:

    norm_before_gate=False:  y = w * u / rms(u),  u = x * silu(z)
    norm_before_gate=True:   y = w * x / rms(x) * silu(z)

and the gate is left out when ``z`` is None. The constructor, the parameter names and ``forward(x, z)`` are those
that Megatron's mixer expects of mamba-ssm's gated norm, so that it can be its ``ExtendedRMSNorm`` base. Source:
Mamba-2 (arXiv 2405.21060, section 7), with one norm group per SSM group as in Megatron's mixer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Normalise ``x`` ``[..., d]`` per group of ``group_size`` channels, gated by ``z`` of the same shape.

    The mathematics is in fp32 (fp64 for fp64 input); the result has the dtype of ``x``. ``group_size`` None means one
    group. Raises ``ValueError`` if ``group_size`` does not divide ``d`` or ``z`` has another shape than ``x``.
    """
    width = x.shape[-1]
    group_size = width if group_size is None else group_size
    if width % group_size:
        raise ValueError(f"group_size={group_size} must divide the normalised width {width}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"the gate z has shape {tuple(z.shape)}, it must equal that of x, {tuple(x.shape)}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(compute)
    gate = None if z is None else F.silu(z.to(compute))
    if gate is not None and not norm_before_gate:
        u = u * gate
    grouped = u.unflatten(-1, (-1, group_size))
    inverse_rms = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = (grouped * inverse_rms).flatten(-2) * weight.to(compute)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


class RMSNormGated(nn.Module):
    """Module form of `gated_rms_norm`; ``weight`` ``[hidden_size]`` starts at one, there is no bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and hidden_size % group_size:
            raise ValueError(f"group_size={group_size} must divide hidden_size={hidden_size}")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_rms_norm(
            x, self.weight, z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )
