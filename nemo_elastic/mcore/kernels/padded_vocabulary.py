"""A vocabulary that tensor parallelism does not divide: rows of zeros up to the next multiple, which no loss ever sees.

    rows = ceil(v / TP) TP,    logit of a padded row = -1e30,    so exp(logit - lse) == 0 and so is its gradient

Megatron pads too, and leaves the padding's logits to be learned down; here they are out from the start, and a run's
losses are those of TP 1. Weights and optimizer state of the padding stay zero. Whole tensors (`slicing.unshard`, nested
checkpoints, children) never have it; a training checkpoint has, as Megatron's have, and Megatron loads one with other
padding (`allow_shape_mismatch`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distill.fused import NO_TOKEN


def masked(logits: Tensor, padding: int) -> Tensor:
    """`[..., v/tp]` with the last `padding` out of every softmax; no gradient reaches them."""
    if not padding:
        return logits
    lowest = max(NO_TOKEN, torch.finfo(logits.dtype).min / 2)
    return F.pad(logits[..., : logits.shape[-1] - padding], (0, padding), value=lowest)


def padding_of(model: nn.Module) -> int:
    """How many of this rank's output rows, the last ones, stand for no token."""
    return getattr(model, "vocab_padding", 0)


def real_vocab_size(model: nn.Module) -> int:
    """Rows that stand for a token, over all ranks."""
    return getattr(model, "real_vocab_size", model.vocab_size)
