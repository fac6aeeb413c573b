"""The Mamba-2 mixer of a subnet: the first heads of every SSM group and the first channels of every head.

B, C, the state and the convolution's width are never cut. In masked mode x is multiplied behind the convolution (so
the bias of a dropped channel cannot leak into the state), and the gated norm, which works per group, counts only
the kept channels in its mean; everything else of a dropped channel is then multiplied by that zero.
"""

from typing import Any

import torch
from torch import Tensor

from ...layout import Axis, ParamSpec
from ..layer_specs import Mixer
from ..versions import conv_parameters, kernels
from .call import LayerCall, MaskCache, product, soft_multiplier, times
from .linear import column_parallel, row_parallel, taken

DIMS = ("mamba_num_heads", "mamba_head_dim")


class ElasticMixer(Mixer):
    """Megatron's mixer; `elastic()` runs the heads and channels of a subnet."""

    def bind(self, rows: dict[str, ParamSpec], axes: dict[str, Axis], tp_group: Any) -> None:
        """Learn this layer's rows of the parameter table."""
        self.rows, self.axes, self.elastic_tp_group, self.masks = rows, axes, tp_group, MaskCache()

    def elastic(self, x: Tensor, call: LayerCall, attention_mask: Tensor | None = None) -> Tensor:
        """`[s, b, h or k]` -> `[s, b, h or k]`."""
        parallel = {"sequence_parallel": self.config.sequence_parallel, "tp_group": self.elastic_tp_group}
        if call.sliced:
            y = column_parallel(self.in_proj, x, self.rows["mixer.in_proj.weight"], call.sizes, **parallel)
            y = self._gated(self._sliced(y, call), call)
            return row_parallel(self.out_proj, y, self.rows["mixer.out_proj.weight"], call.sizes, **parallel)
        packed = self.in_proj(x)[0]
        y = self._soft(packed, call) if call.plan.soft else self._gated(self._masked(packed, call), call)
        return self.out_proj(y)[0]

    def _gated(self, y: Tensor, call: LayerCall) -> Tensor:
        return times(y, product([call.split(dim) for dim in DIMS]))

    def _sliced(self, packed: Tensor, call: LayerCall) -> Tensor:
        """`[s, b, z+x+B+C+dt]` of the child -> normed `[s, b, x]`, with the child's parameters."""
        parameters = {name: taken(p, self.rows[f"mixer.{name}"], call.sizes) for name, p in self._parameters_cut()}
        y = self._scan(packed, parameters, call.sizes["mamba_head_dim"])
        return _group_norm(
            y, parameters["norm.weight"], self.ngroups_local_tp, y.shape[-1] // self.ngroups_local_tp, self.norm.eps
        )

    def _masked(self, packed: Tensor, call: LayerCall) -> Tensor:
        """`[s, b, z+x+B+C+dt]` at full width -> normed `[s, b, x]`, zero where the subnet has nothing.

        A convolution without weight and bias puts out silu(0) = 0: x of what is dropped, and all that follows, is zero.
        """
        parameters = dict(self._parameters_cut())
        mask = self.masks.prefix(self.axes["x+B+C"], call.sizes, packed)
        if mask is not None:
            parameters["conv1d.weight"] = parameters["conv1d.weight"] * mask[:, None, None]
            parameters["conv1d.bias"] = parameters["conv1d.bias"] * mask
        y = self._scan(packed, parameters, self.headdim)
        kept = call.sizes["mamba_num_heads"] // self.ngroups * call.sizes["mamba_head_dim"]
        return _group_norm(y, parameters["norm.weight"], self.ngroups_local_tp, kept, self.norm.eps)

    def _parameters_cut(self) -> list[tuple[str, Tensor]]:
        """(name behind `mixer.`, parameter) of what lies between the projections."""
        weight, bias = conv_parameters(self)
        return [
            ("conv1d.weight", weight),
            ("conv1d.bias", bias),
            ("dt_bias", self.dt_bias),
            ("A_log", self.A_log),
            ("D", self.D),
            ("norm.weight", self.norm.weight),
        ]

    def _scan(self, packed: Tensor, parameters: dict[str, Tensor], head_dim: int) -> Tensor:
        """The fused convolution, scan and gate: `[s, b, z+x+B+C+dt]` -> `[s, b, x]`."""
        y = kernels.mamba_split_conv1d_scan_combined(
            packed.transpose(0, 1).contiguous(),
            parameters["conv1d.weight"].squeeze(1),
            parameters["conv1d.bias"],
            parameters["dt_bias"].float(),
            -torch.exp(parameters["A_log"].float()),
            D=parameters["D"],
            chunk_size=self.chunk_size,
            activation=self.activation,
            headdim=head_dim,
            ngroups=self.ngroups_local_tp,
            norm_before_gate=self.norm_before_gate,
        )
        return y.transpose(0, 1)

    def _soft(self, packed: Tensor, call: LayerCall) -> Tensor:
        """As `_masked`, x multiplied by soft masks behind the convolution and its activation."""
        inner, state, heads = self.d_inner_local_tp, self.ngroups_local_tp * self.d_state, self.nheads_local_tp
        z, xbc, dt = packed.transpose(0, 1).split([inner, inner + 2 * state, heads], dim=-1)
        weight, bias = conv_parameters(self)
        xbc = kernels.causal_conv1d_fn(
            x=xbc.transpose(1, 2).contiguous(), weight=weight.squeeze(1), bias=bias, activation=self.activation
        )
        x, b, c = xbc.transpose(1, 2).split([inner, state, state], dim=-1)
        x = times(x, soft_multiplier(call, self.axes["x"], DIMS))
        y = kernels.mamba_chunk_scan_combined(
            x.unflatten(-1, (heads, self.headdim)).contiguous(),
            dt.contiguous(),
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (self.ngroups_local_tp, self.d_state)).contiguous(),
            c.unflatten(-1, (self.ngroups_local_tp, self.d_state)).contiguous(),
            self.chunk_size,
            D=self.D,
            z=z.unflatten(-1, (heads, self.headdim)).contiguous(),  # without a gate, mamba-ssm before 2.3 gets dD wrong
            dt_bias=self.dt_bias.float(),
            dt_softplus=True,
        ).flatten(2)
        kept = self._soft_kept_per_group(call)
        return _group_norm(y.transpose(0, 1), self.norm.weight, self.ngroups_local_tp, kept, self.norm.eps)

    def _soft_kept_per_group(self, call: LayerCall) -> Tensor | int:
        """Channels of a norm group that count: heads of the group x channels of a head."""
        heads, channels = (call.split(dim) for dim in DIMS)
        heads_kept = self.nheads // self.ngroups if heads is None else heads.sum()
        return heads_kept * (self.headdim if channels is None else channels.sum())


def _group_norm(y: Tensor, weight: Tensor, groups: int, kept: Tensor | int, eps: float) -> Tensor:
    """RMS norm of `[s, b, x]` per group over `kept` channels (the gate is already in y), in fp32 or fp64."""
    u = (y if y.dtype == torch.float64 else y.float()).unflatten(-1, (groups, -1))
    u = u * torch.rsqrt(u.square().sum(-1, keepdim=True) / kept + eps)
    return (u.flatten(-2) * weight.to(u.dtype)).to(y.dtype)
