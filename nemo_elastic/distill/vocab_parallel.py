"""Reductions over a vocabulary that is split over tensor-parallel ranks, of per-token statistics only (`[tokens]`).

Identity: with local `l_r = logsumexp(z_r)`, `lse = max_r l_r + log sum_r exp(l_r - max)`; a sum of `exp(z - lse) f`
over the vocabulary is `sum_r exp(l_r - lse) (local sum of exp(z - l_r) f)`. So two small all-reduces do for a chunk of
tokens, and no rank ever sees another rank's logits. The group is an argument; None means a single rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def max_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise sum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(size, rank) of a group; (1, 0) for None."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


def top_k_over(values: Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k largest of `[tokens, v/tp]` over all ranks: values and GLOBAL indices, both `[tokens, k]`.

    The candidates are gathered as plain data. An autograd all-gather here would multiply gradients by TP (METHOD
    section 8, trap 4): nothing in this file is differentiated.
    """
    size, rank = world(group)
    local = values.shape[-1]
    top, index = values.topk(min(k, local), dim=-1)
    if group is None:
        return top, index
    index = index + rank * local
    tops, indices = [torch.empty_like(top) for _ in range(size)], [torch.empty_like(index) for _ in range(size)]
    dist.all_gather(tops, top.contiguous(), group=group)
    dist.all_gather(indices, index.contiguous(), group=group)
    top, where = torch.cat(tops, dim=-1).topk(min(k, local * size), dim=-1)
    return top, torch.cat(indices, dim=-1).gather(-1, where)
