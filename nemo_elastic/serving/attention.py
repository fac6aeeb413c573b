"""Causal attention of a child: it remembers keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mcore.kernels.grouped_heads import ungrouped
from ..mcore.kernels.rotary import frequencies, turned
from .linear import Linear
from .parts import Parts, rms_norm


@dataclass
class AttentionCache:
    """Keys and values `[b, g, room, d]`, of which the first `length` are there; room doubles when it is full.

    A generation knows its length and asks for all of it at once.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @property
    def seen(self) -> int:
        """How many tokens are before the next."""
        return self.length

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

    @property
    def seen(self) -> Tensor:
        """How many tokens are before the next, `[1]` on the device."""
        return self.position

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
class Attention:
    """Causal attention; `kv` groups share their keys among the kept query heads.

    `head_norms`: weights `[d]` of the norms of queries and keys; `frequencies` `[d/2]` of rotary positions; None: none.
    """

    norm: Tensor
    eps: float
    qkv: Linear
    proj: Linear
    groups: int
    channels: int
    scale: float | None
    head_norms: tuple[Tensor, Tensor] | None = None
    frequencies: Tensor | None = None

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> AttentionCache | FixedAttentionCache:
        """An empty one with room for so many tokens; with the `position` of a step, one that never grows."""
        keys, values = (self.norm.new_zeros(batch, self.groups, room, self.channels) for _ in range(2))
        return AttentionCache(keys, values) if position is None else FixedAttentionCache(keys, values, position)

    def __call__(self, x: Tensor, cache: AttentionCache | FixedAttentionCache | None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        packed = self.qkv(rms_norm(x, self.norm, self.eps))
        grid = packed.unflatten(-1, (self.groups, -1, self.channels)).transpose(1, 2)  # [b, g, s, r + 2, d]
        q, k, v, mask = grid[..., :-2, :], grid[..., -2, :], grid[..., -1, :], None
        if self.head_norms is not None:
            q, k = (rms_norm(t, weight, self.eps) for t, weight in zip((q, k), self.head_norms, strict=True))
        if self.frequencies is not None:
            angles = self._positions(x.shape[1], cache).unsqueeze(-1) * self.frequencies
            q, k = turned(q, angles.unsqueeze(-2)), turned(k, angles)
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

    def _positions(self, new: int, cache: AttentionCache | FixedAttentionCache | None) -> Tensor:
        """`[s]`: where the new tokens stand."""
        places = torch.arange(new, device=self.norm.device, dtype=torch.float32)
        return places if cache is None else places + cache.seen


def layer(parts: Parts) -> Attention:
    """A layer from its parameters."""
    arch, function, norm = parts.architecture, parts.function, parts.vector("input_layernorm.weight")
    names = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
    turns = function["position_embedding_type"] != "none"
    return Attention(
        norm=norm,
        eps=parts.eps,
        qkv=parts.matrix("self_attention.linear_qkv.weight"),
        proj=parts.matrix("self_attention.linear_proj.weight"),
        groups=arch.num_query_groups,
        channels=arch.kv_channels,
        scale=function["softmax_scale"],
        head_norms=tuple(parts.vector(name) for name in names) if arch.qk_layernorm else None,
        frequencies=frequencies(function, arch.kv_channels, norm.device) if turns else None,
    )
