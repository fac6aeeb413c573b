"""A sequence split over context-parallel ranks, as Megatron deals it: rank r of n has chunks r and 2n - 1 - r of 2n.

    attention    all keys and values are gathered; each of a rank's two chunks of queries sees what is not behind it
    Mamba        an all-to-all trades positions for heads, so that a rank scans the whole sequence for 1/n of the heads

Keys and values are never cut, so the gather does not depend on the subnet; the exchange of heads is Megatron's own,
told the sizes of the subnet. What a position computes alone (norms, MLPs, experts, losses) needs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def own_chunks(whole: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's positions `[.., s/n, ..]` of `[.., s, ..]`; the tensor itself without context parallelism."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=dim)


def own_positions(length: int, group: dist.ProcessGroup, device: torch.device | None = None) -> Tensor:
    """`[s/n]`: which positions of a sequence of `length` tokens are this rank's."""
    return own_chunks(torch.arange(length, device=device), group, dim=0)


def whole_sequence(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[s/n, ..]` of this rank -> `[s, ..]` in order; the gradient is summed over the ranks."""
    size = group.size()
    if size == 1:
        return part
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(2 * size)
    order = [2 * rank for rank in range(size)] + [2 * rank + 1 for rank in reversed(range(size))]
    return torch.cat([chunks[i] for i in order])


def chunk_spans(length: int, group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """(first, one past the last) position of each chunk of a rank's `length` positions."""
    size, rank = group.size(), group.rank()
    half = length // 2
    return [(i * half, (i + 1) * half) for i in (rank, 2 * size - 1 - rank)]


def over_heads(mixer: Any, parameters: Mapping[str, Tensor], head_dim: int) -> Any:
    """Megatron's exchange of positions for heads for a mixer at a subnet's sizes; does nothing without such ranks.

    Args:
        parameters: the subnet's on this tensor-parallel rank: `conv1d.weight`, `conv1d.bias`, `dt_bias`, `A_log`, `D`.
        head_dim: channels of a head of the subnet.
    """
    heads = len(parameters["dt_bias"])
    return type(mixer.cp)(
        cp_group=mixer.pg_collection.cp,
        d_inner_local_tp=heads * head_dim,
        nheads_local_tp=heads,
        ngroups_local_tp=mixer.ngroups_local_tp,
        d_state=mixer.d_state,
        conv1d_cp1=SimpleNamespace(weight=parameters["conv1d.weight"], bias=parameters["conv1d.bias"]),
        dt_bias_cp1=parameters["dt_bias"],
        A_log_cp1=parameters["A_log"],
        D_cp1=parameters["D"],
        D_has_hdim=False,
    )


def own_channels(multiplier: Tensor | None, parts: Any) -> Tensor | None:
    """The part of a multiplier of x `[x/tp]` for the heads that this rank scans."""
    if multiplier is None or parts.cp_size == 1:
        return multiplier
    return multiplier.chunk(parts.cp_size)[parts.cp_rank]
