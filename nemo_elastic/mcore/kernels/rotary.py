"""What rotary positions are, without Megatron: frequencies, and how a head's channels are turned by angles.

    w_i = rotary_base^(-2i/d),  i < d/2,  d = rotary_percent x kv_channels;    angle(t, i) = t / interpolation * w_i

Scaled as Llama 3.1 does, with n = `rope_original_max_position_embeddings` and wavelength = 2 pi / w:

    w' = w / factor   where wavelength > n / low        w' = w   where wavelength < n / high
    w' = (1 - m) w / factor + m w   between,    m = (n / wavelength - low) / (high - low)

Pair i are the channels i and i + d/2; channels from d on do not turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def frequencies(function: Mapping[str, Any], kv_channels: int, device: torch.device | None = None) -> Tensor:
    """`[d/2]` radians a position, fp32, of what `function_fields.arithmetic_of` says."""
    turned = int(kv_channels * function["rotary_percent"])
    powers = torch.arange(0, turned, 2, dtype=torch.float32, device=device) / turned
    found = 1.0 / function["rotary_base"] ** powers
    if function["rope_scaling_factor"] is not None:
        found = scaled(
            found,
            factor=function["rope_scaling_factor"],
            low=function["rope_low_freq_factor"],
            high=function["rope_high_freq_factor"],
            length=function["rope_original_max_position_embeddings"],
        )
    return found / (function["seq_len_interpolation_factor"] or 1.0)


def scaled(frequencies: Tensor, *, factor: float, low: float, high: float, length: int) -> Tensor:
    """Frequencies `[d/2]` of a longer context, from those of `length` tokens."""
    turns = length * frequencies / (2 * math.pi)  # over the old context
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - mix) * frequencies / factor + mix * frequencies


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """`x` `[.., s, d_head]` by angles `[s, d/2]` (or whatever broadcasts to `[.., s, d/2]`)."""
    half = angles.shape[-1]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
