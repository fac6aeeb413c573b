"""Mamba-2 of a child: it remembers the last inputs of the convolution and the state of the scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mcore.kernels.causal_conv import depthwise_causal_conv
from ..mcore.kernels.gated_norm import gated_rms_norm
from ..mcore.kernels.ssd import mamba_chunk_scan_combined, mamba_step
from .linear import Linear
from .parts import Parts, rms_norm

MIXER_NORM_EPS = 1e-5  # Megatron's mixer has it fixed
CHUNK = 128


@dataclass
class MambaCache:
    """`conv` `[b, K-1, x+B+C]`: the last inputs of the convolution; `state` `[b, heads, head channels, n]`."""

    conv: Tensor
    state: Tensor

    def take(self, other: MambaCache) -> None:
        """Remember what `other` does, in place."""
        self.conv.copy_(other.conv)
        self.state.copy_(other.state)


@dataclass(frozen=True)
class Mamba:
    """A Mamba-2 layer of a child. `a` is -exp(A_log)."""

    norm: Tensor
    eps: float
    in_proj: Linear
    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    a: Tensor
    d: Tensor
    inner_norm: Tensor
    out_proj: Linear
    head_dim: int
    groups: int
    state_dim: int

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> MambaCache:
        """An empty one, changed in place from then on; its size depends on neither `room` nor `position`."""
        width, kernel = self.conv_weight.shape[0], self.conv_weight.shape[-1]
        heads = self.a.shape[0]
        return MambaCache(
            self.norm.new_zeros(batch, kernel - 1, width),
            self.a.new_zeros(batch, heads, self.head_dim, self.state_dim),
        )

    def __call__(self, x: Tensor, cache: MambaCache | None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`; with a cache, the tokens behind those it has seen."""
        heads, inner, state = self.a.shape[0], self.a.shape[0] * self.head_dim, self.groups * self.state_dim
        packed = self.in_proj(rms_norm(x, self.norm, self.eps))
        z, xbc, dt = packed.split([inner, inner + 2 * state, heads], dim=-1)
        history = None if cache is None else cache.conv
        convolved = depthwise_causal_conv(xbc, self.conv_weight.squeeze(1), self.conv_bias, history, "silu")
        if cache is not None:
            cache.conv.copy_(torch.cat([cache.conv, xbc], dim=1)[:, xbc.shape[1] :])
        u, b, c = convolved.split([inner, state, state], dim=-1)
        u = u.unflatten(-1, (heads, self.head_dim))
        b, c = (t.unflatten(-1, (self.groups, self.state_dim)) for t in (b, c))
        y = self._scan(u, dt, b, c, cache).flatten(2)
        y = gated_rms_norm(y, self.inner_norm, z, eps=MIXER_NORM_EPS, group_size=inner // self.groups)
        return x + self.out_proj(y)

    def _scan(self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, cache: MambaCache | None) -> Tensor:
        if cache is not None and u.shape[1] == 1:
            first = [t[:, 0] for t in (u, dt, b, c)]
            y = mamba_step(cache.state, first[0], first[1], self.a, first[2], first[3], D=self.d, dt_bias=self.dt_bias)
            return y.unsqueeze(1)
        start = None if cache is None else cache.state
        more = {"D": self.d, "dt_bias": self.dt_bias, "dt_softplus": True, "return_final_states": True}
        y, final = mamba_chunk_scan_combined(u, dt, self.a, b, c, CHUNK, initial_states=start, **more)
        if cache is not None:
            cache.state.copy_(final)
        return y


def layer(parts: Parts) -> Mamba:
    """A layer from its parameters."""
    log, arch = parts.vector("mixer.A_log"), parts.architecture
    wide = log.dtype if log.dtype == torch.float64 else torch.float32
    return Mamba(
        norm=parts.vector("norm.weight"),
        eps=parts.eps,
        in_proj=parts.matrix("mixer.in_proj.weight"),
        conv_weight=parts.vector("mixer.conv1d.weight"),
        conv_bias=parts.vector("mixer.conv1d.bias"),
        dt_bias=parts.vector("mixer.dt_bias").to(wide),
        a=-torch.exp(log.to(wide)),
        d=parts.vector("mixer.D"),
        inner_norm=parts.vector("mixer.norm.weight"),
        out_proj=parts.matrix("mixer.out_proj.weight"),
        head_dim=parts.sizes["mamba_head_dim"],
        groups=arch.mamba_num_groups,
        state_dim=arch.mamba_state_dim,
    )
