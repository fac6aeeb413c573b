"""The Mamba-2 mixer of a subnet: the first heads of every SSM group and the first channels of every head.

B, C, the state and the convolution's width are never cut. In masked mode x is multiplied behind the convolution (so
the bias of a dropped channel cannot leak into the state), and the gated norm, which works per group, counts only
the kept channels in its mean; everything else of a dropped channel is then multiplied by that zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from ...importance.scores import (
    channel_contribution,
    contribution_grams,
    head_contribution,
    mamba_channel_scores,
    mamba_head_scores,
)
from ...kinds import mamba as facts
from ...space.architecture import Architecture
from ...space.layout import Axis, ParamSpec
from ..kernels.context import over_heads, own_channels
from ..kernels.kind_modules import norm_keys
from ..kernels.layer_specs import Mixer
from ..kernels.norm import RMSNorm
from ..kernels.observing import Observer, WidthSettings
from ..versions import conv_parameters, kernels
from .call import LayerCall, MaskCache, product, soft_multiplier, times
from .layers import ElasticLayer
from .linear import column_parallel, row_parallel, taken
from .norm import ElasticRMSNorm

DIMS = ("mamba_num_heads", "mamba_head_dim")
CHANNELS, HEADS = "mamba", "mamba_heads"  # what ranks them, in the state of an interrupted ranking


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
        own = over_heads(self, parameters, head_dim)
        y = kernels.mamba_split_conv1d_scan_combined(
            own.pre_conv_ssm(packed).transpose(0, 1).contiguous(),
            own.get_conv1d_weight().squeeze(1),
            own.get_conv1d_bias(),
            own.get_dt_bias().float(),
            -torch.exp(own.get_A_log().float()),
            D=own.get_D(),
            chunk_size=self.chunk_size,
            activation=self.activation,
            headdim=head_dim,
            ngroups=own.ngroups_local_tpcp,
            norm_before_gate=self.norm_before_gate,
        )
        return own.post_conv_ssm(y.transpose(0, 1))

    def _soft(self, packed: Tensor, call: LayerCall) -> Tensor:
        """As `_masked`, x multiplied by soft masks behind the convolution and its activation."""
        own = over_heads(self, dict(self._parameters_cut()), self.headdim)
        groups, heads = own.ngroups_local_tpcp, own.nheads_local_tpcp
        inner, state = own.d_inner_local_tpcp, groups * self.d_state
        z, xbc, dt = own.pre_conv_ssm(packed).transpose(0, 1).split([inner, inner + 2 * state, heads], dim=-1)
        weight, bias = own.get_conv1d_weight(), own.get_conv1d_bias()
        xbc = kernels.causal_conv1d_fn(
            x=xbc.transpose(1, 2).contiguous(), weight=weight.squeeze(1), bias=bias, activation=self.activation
        )
        x, b, c = xbc.transpose(1, 2).split([inner, state, state], dim=-1)
        x = times(x, own_channels(soft_multiplier(call, self.axes["x"], DIMS), own))
        y = kernels.mamba_chunk_scan_combined(
            x.unflatten(-1, (heads, self.headdim)).contiguous(),
            dt.contiguous(),
            -torch.exp(own.get_A_log().float()),
            b.unflatten(-1, (groups, self.d_state)).contiguous(),
            c.unflatten(-1, (groups, self.d_state)).contiguous(),
            self.chunk_size,
            D=own.get_D(),
            z=z.unflatten(-1, (heads, self.headdim)).contiguous(),  # without a gate, mamba-ssm before 2.3 gets dD wrong
            dt_bias=own.get_dt_bias().float(),
            dt_softplus=True,
        ).flatten(2)
        y = own.post_conv_ssm(y.transpose(0, 1))
        kept = self._soft_kept_per_group(call)
        return _group_norm(y, self.norm.weight, self.ngroups_local_tp, kept, self.norm.eps)

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


class ElasticMambaLayer(ElasticLayer, MambaLayer):
    """Norm, Mamba mixer, residual."""

    part_names = ("norm", "mixer", "mamba_bda")


LAYER, SUBLAYER = ElasticMambaLayer, ElasticMixer


def plain_layer() -> ModuleSpec:
    """Megatron's Mamba layer from local linears, with our `Mixer`."""
    parts = MambaLayerSubmodules(
        norm=RMSNorm,
        mixer=ModuleSpec(
            module=Mixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
        ),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=norm_keys(facts.MAMBA),
    )
    return ModuleSpec(module=MambaLayer, submodules=parts)


def elastic_layer(*, transformer_engine: bool = False) -> ModuleSpec:
    """The same layer, elastic."""
    spec = plain_layer()
    spec.module, spec.submodules.norm, spec.submodules.mixer.module = LAYER, ElasticRMSNorm, SUBLAYER
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        linears = spec.submodules.mixer.submodules
        linears.in_proj, linears.out_proj = TEColumnParallelLinear, TERowParallelLinear
    return spec


def observe(collector: Observer, number: int, layer: nn.Module) -> None:
    """Watch a plain layer where `rank.mamba_site` says."""
    mixer, site = layer.mixer, collector.settings.mamba_site
    collector.watch_norm(number, layer.norm, mixer.in_proj)
    if site == "out_proj_input":
        collector.on_input(mixer.out_proj, lambda y: collector.see(CHANNELS, number, y))
    elif site == "out_proj_contribution":
        grams = contribution_grams(mixer.out_proj.weight, mixer.nheads_local_tp)

        def see(y: Tensor) -> None:
            collector.see(CHANNELS, number, channel_contribution(y, grams))
            collector.see(HEADS, number, head_contribution(y, grams))

        collector.on_input(mixer.out_proj, see)
    else:
        z, x = collector.local.axes["z+x+B+C+dt"][:2]
        start, length = z.length({}), x.length({})
        collector.on_output(mixer.in_proj, CHANNELS, number, part=lambda y: y.narrow(-1, start, length))


def unit_scores(sites: Mapping[str, Tensor], architecture: Architecture, settings: WidthSettings) -> dict[str, Tensor]:
    """Scores per head channel `[p]` and per head `[m]`."""
    pairs = sites[CHANNELS].view(architecture.mamba_num_heads, -1)
    top = settings.top_channels or architecture.mamba_head_dim
    heads = sites[HEADS] if HEADS in sites else mamba_head_scores(pairs, top)
    return {"mamba_head_dim": mamba_channel_scores(pairs), "mamba_num_heads": heads}
