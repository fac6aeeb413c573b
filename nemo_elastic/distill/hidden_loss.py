"""Squared distance of the final hidden states, over the channels that the child keeps.

    loss = sum over tokens of mask  sum_c m_c (x_c - y_c)^2 / sum_c m_c        m: kept channels (soft: their masks)

Sorted channels make the child's a prefix of the parent's, so no projection is needed in between (METHOD section 5).
"""

import torch
from torch import Tensor


def hidden_loss(student: Tensor, teacher: Tensor, kept: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens, an fp32 scalar.

    Args:
        student: `[..., k]` or, masked, `[..., h]`.
        teacher: `[..., h]`; no gradient.
        kept: number of kept channels, or a weight per channel `[h]`.
        mask: weight per token `[...]`.
    """
    if isinstance(kept, Tensor):
        weights = kept.detach().float()
        error = (student.float() - teacher.detach().float()).square() @ (weights / weights.sum().clamp_min(1e-6))
    else:
        error = (student[..., :kept].float() - teacher.detach()[..., :kept].float()).square().mean(-1)
    return error.sum() if mask is None else (error * mask.to(torch.float32)).sum()
