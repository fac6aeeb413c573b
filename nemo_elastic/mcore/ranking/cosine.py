"""Layers (or blocks) by how little they turn the residual stream: the cheap ranking to compare the ablation with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .stack_forward import Groups, StackForward


def cosine_scores(
    model: nn.Module, batches: Sequence[Tensor], groups: Groups | None = None, unit: int = 1
) -> dict[int, float]:
    """`1 - mean cos(unit's input, unit's output)` by a unit's first layer, from one forward; the same on every rank.

    What enters a unit travels with the hidden states where a pipeline stage ends inside it.
    """
    groups = groups or Groups.from_megatron()
    stack = StackForward(model, groups)
    device, depth = batches[0].device, len(stack.stage_of)
    sums = torch.zeros(depth + 1, dtype=torch.float64, device=device)  # last: tokens seen
    for tokens in batches:
        hidden = stack.embed(tokens) if stack.is_first else stack.receive(tokens)
        own = sorted(stack.layers)
        entering = stack.receive(tokens) if own[0] % unit else hidden
        for number in own:
            entering = entering if number % unit else hidden
            hidden = stack.layer(number, hidden)
            if number % unit == unit - 1:
                alike = torch.cosine_similarity(entering.float(), hidden.float(), dim=-1)
                sums[number - unit + 1] += alike.sum(dtype=torch.float64)
        sums[depth] += hidden.shape[0] * hidden.shape[1]
        if not stack.is_last:
            stack.send(hidden)
            if (own[-1] + 1) % unit:
                stack.send(entering)
    stack.wait()
    if stack.sequence_is_split:
        dist.all_reduce(sums, group=groups.tp)
    dist.all_reduce(sums, group=groups.dp)
    tokens_seen = sums[depth].clone()  # before the stages, which all saw them, are summed
    dist.all_reduce(sums, group=groups.pp)
    for group in (groups.tp, groups.ep):
        dist.broadcast(sums, dist.get_global_rank(group, 0), group=group)
    scores = (1.0 - sums[:depth] / tokens_seen).tolist()
    return {first: scores[first] for first in range(0, depth, unit)}
