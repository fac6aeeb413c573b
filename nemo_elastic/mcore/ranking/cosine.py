"""Layers by how little they turn the residual stream: the cheap ranking to compare the ablation with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .stack_forward import Groups, StackForward


def cosine_scores(model: nn.Module, batches: Sequence[Tensor], groups: Groups | None = None) -> dict[int, float]:
    """`1 - mean cos(layer's input, layer's output)` per layer, from one forward; the same on every rank."""
    groups = groups or Groups.from_megatron()
    stack = StackForward(model, groups)
    device, depth = batches[0].device, len(stack.stage_of)
    sums = torch.zeros(depth + 1, dtype=torch.float64, device=device)  # last: tokens seen
    for tokens in batches:
        hidden = stack.embed(tokens) if stack.is_first else stack.receive(tokens)
        for number in sorted(stack.layers):
            after = stack.layer(number, hidden)
            sums[number] += torch.cosine_similarity(hidden.float(), after.float(), dim=-1).sum(dtype=torch.float64)
            hidden = after
        sums[depth] += hidden.shape[0] * hidden.shape[1]
        if not stack.is_last:
            stack.send(hidden)
    stack.wait()
    if stack.sequence_is_split:
        dist.all_reduce(sums, group=groups.tp)
    dist.all_reduce(sums, group=groups.dp)
    tokens_seen = sums[depth].clone()  # before the stages, which all saw them, are summed
    dist.all_reduce(sums, group=groups.pp)
    dist.broadcast(sums, dist.get_global_rank(groups.tp, 0), group=groups.tp)
    return dict(enumerate((1.0 - sums[:depth] / tokens_seen).tolist()))
