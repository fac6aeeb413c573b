"""The three kinds of layer of a child, with what they remember between calls. Batch first, one device, no training.

    x <- x + sublayer(norm(x))            x [b, s, k]

A layer's cache makes a call on tokens `t .. t+s` equal to that part of a call on all of them: keys and values of
attention, the last inputs of Mamba's convolution and the state of its scan. Numbers as in the elastic layers: norms,
convolution and scan in fp32 (fp64 stays), the rest in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mcore.causal_conv import depthwise_causal_conv
from ..mcore.gated_norm import gated_rms_norm
from ..mcore.grouped_heads import ungrouped
from ..mcore.ssd import mamba_chunk_scan_combined, mamba_step
from .linear import Linear

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


@dataclass
class AttentionCache:
    """Keys and values `[b, g, room, d]`, of which the first `length` are there; room doubles when it is full.

    A generation knows its length and asks for all of it at once.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in `[b, g, s, d]`; returns all that is there, and which of it the new tokens see, `[s, all]`.

        No mask: a single token sees all, and of what came first every token sees what is before it.
        """
        past, new = self.length, keys.shape[2]
        end = past + new
        if end > self.keys.shape[2]:
            room = max(end, 2 * self.keys.shape[2])
            self.keys, self.values = (_grown(t, self.length, room) for t in (self.keys, self.values))
        self.keys[:, :, past:end] = keys
        self.values[:, :, past:end] = values
        self.length = end
        mask = None
        if past and new > 1:
            mask = torch.ones(new, end, dtype=torch.bool, device=keys.device).tril(past)
        return self.keys[:, :, :end], self.values[:, :, :end], mask


def _grown(old: Tensor, length: int, room: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], room, old.shape[3])
    new[:, :, :length] = old[:, :, :length]
    return new


@dataclass(frozen=True)
class FixedAttentionCache:
    """The same in memory that never changes its size, `[b, g, room, d]`; `position` `[1]`, on the device, were seen.

    Whoever runs a step moves `position` on. What lies behind it must be finite: it is masked, not left out.
    """

    keys: Tensor
    values: Tensor
    position: Tensor

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in one token `[b, g, 1, d]`; returns all memory, and which of it that token sees, `[1, room]`."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        seen = torch.arange(self.keys.shape[2], device=self.keys.device) <= self.position
        return self.keys, self.values, seen.unsqueeze(0)

    def take(self, other: AttentionCache) -> None:
        """Remember what `other` does, in place."""
        for mine, given in ((self.keys, other.keys), (self.values, other.values)):
            mine.zero_()
            mine[:, :, : other.length] = given[:, :, : other.length]


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


@dataclass(frozen=True)
class Attention:
    """Causal attention without positions; `kv` groups share their keys among the kept query heads."""

    norm: Tensor
    eps: float
    qkv: Linear
    proj: Linear
    groups: int
    channels: int
    scale: float | None

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> AttentionCache | FixedAttentionCache:
        """An empty one with room for so many tokens; with the `position` of a step, one that never grows."""
        keys, values = (self.norm.new_zeros(batch, self.groups, room, self.channels) for _ in range(2))
        return AttentionCache(keys, values) if position is None else FixedAttentionCache(keys, values, position)

    def __call__(self, x: Tensor, cache: AttentionCache | FixedAttentionCache | None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        packed = self.qkv(rms_norm(x, self.norm, self.eps))
        grid = packed.unflatten(-1, (self.groups, -1, self.channels)).transpose(1, 2)  # [b, g, s, r + 2, d]
        q, k, v, mask = grid[..., :-2, :], grid[..., -2, :], grid[..., -1, :], None
        if cache is not None:
            k, v, mask = cache.extended(k, v)
        if x.shape[1] == 1:  # its r query heads stand where tokens would, so that a group's keys are read once
            y = F.scaled_dot_product_attention(q.squeeze(2), k, v, attn_mask=mask, scale=self.scale)  # [b, g, r, d]
            return x + self.proj(y.flatten(1).unsqueeze(1))
        q = q.transpose(2, 3).flatten(1, 2)  # [b, g r, s, d]
        k, v = ungrouped(q, k, v)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return x + self.proj(y.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class MLP:
    """Two products and an elementwise activation; it remembers nothing."""

    norm: Tensor
    eps: float
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> None:
        """Nothing."""
        return None

    def __call__(self, x: Tensor, cache: None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        return x + self.down(self.activation(self.up(rms_norm(x, self.norm, self.eps))))


Layer = Mamba | Attention | MLP
LayerCache = MambaCache | AttentionCache | FixedAttentionCache | None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last axis, in fp32 (fp64 for fp64)."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(y.dtype)).to(x.dtype)
