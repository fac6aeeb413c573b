"""Causal attention of a child: it remembers keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mcore.grouped_heads import ungrouped
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

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in `[b, g, s, d]`; returns all that is there."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            room = max(end, 2 * self.keys.shape[2])
            self.keys, self.values = (_grown(t, self.length, room) for t in (self.keys, self.values))
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def _grown(old: Tensor, length: int, room: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], room, old.shape[3])
    new[:, :, :length] = old[:, :, :length]
    return new


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

    def cache(self, batch: int, room: int = 0) -> AttentionCache:
        """An empty one with room for so many tokens."""
        empty = self.norm.new_empty(batch, self.groups, room, self.channels)
        return AttentionCache(empty, empty.clone())

    def __call__(self, x: Tensor, cache: AttentionCache | None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        packed = self.qkv(rms_norm(x, self.norm, self.eps))
        grid = packed.unflatten(-1, (self.groups, -1, self.channels)).transpose(1, 2)  # [b, g, s, r + 2, d]
        q = grid[..., :-2, :].transpose(2, 3).flatten(1, 2)  # [b, g r, s, d]
        k, v = grid[..., -2, :], grid[..., -1, :]
        new = k.shape[2]
        if cache is not None:
            k, v = cache.extended(k, v)
        past = k.shape[2] - new
        k, v = ungrouped(q, k, v)
        mask = None
        if past and new > 1:
            mask = torch.ones(new, k.shape[2], dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not past, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return x + self.proj(y.transpose(1, 2).flatten(2))


def layer(parts: Parts) -> Attention:
    """A layer from its parameters."""
    return Attention(
        norm=parts.vector("input_layernorm.weight"),
        eps=parts.eps,
        qkv=parts.matrix("self_attention.linear_qkv.weight"),
        proj=parts.matrix("self_attention.linear_proj.weight"),
        groups=parts.architecture.num_query_groups,
        channels=parts.architecture.kv_channels,
        scale=parts.softmax_scale,
    )
