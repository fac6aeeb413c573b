"""RMSNorm of a residual stream of which only some channels are kept.

With x zero outside its first k of n channels (METHOD section 2):

    rms_norm(x[..., :k], eps) == sqrt(k/n) * rms_norm(x, eps * k/n)[..., :k] == x * rsqrt(sum(x^2)/k + eps) * w

`kept` is k: an integer when hard, the sum of the soft mask otherwise.
"""

import torch
from torch import Tensor

from ...space.layout import ParamSpec
from ..kernels.norm import RMSNorm
from .call import LayerCall, times
from .linear import taken


class ElasticRMSNorm(RMSNorm):
    """The plain norm, and `elastic()` for a subnet. Unfused, so that any linear may stand behind it."""

    def elastic(self, x: Tensor, call: LayerCall, spec: ParamSpec) -> Tensor:
        """`x` `[s, b, h]` masked, or `[s, b, k]` sliced; the hidden gate of a hard plan multiplies the output."""
        weight = taken(self.weight, spec, call.sizes) if call.sliced else self.weight
        y = rms_norm(x, weight, call.kept_hidden(), self.eps, self.scale)
        return times(y, call.hidden_gate())


def rms_norm(x: Tensor, weight: Tensor, kept: Tensor | int, eps: float, scale: float = 1.0) -> Tensor:
    """`x * rsqrt(sum(x^2) / kept + eps) * weight * scale` over the last axis, in fp32 (fp64 for fp64)."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().sum(-1, keepdim=True) / kept + eps)
    y = y * weight.to(y.dtype)
    return (y if scale == 1.0 else y * scale).to(x.dtype)
