"""Grouped query heads for torch's attention kernels.

On a GPU the kernel that knows grouped heads takes 16-bit numbers only. In fp32 torch would fall back to one that writes
all scores `[b, n, s, s]`: 8.6 GB at 8192 tokens and 32 heads. There keys and values are repeated instead.
"""

from torch import Tensor, float32


def ungrouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[b, g, s, d]` as they are; in fp32 on a GPU one per query head, `[b, n, s, d]`."""
    if q.dtype != float32 or q.device.type == "cpu" or q.shape[1] == k.shape[1]:
        return k, v
    shared = q.shape[1] // k.shape[1]
    return k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
