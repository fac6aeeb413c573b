"""Tokens to the expert-parallel ranks that hold their experts, and back: all-to-all each way.

    there(x)[of local expert e] = the rows for e of every rank,    back(there(x)) == x

Every rank of the group runs the same subnet, so that of a child's experts each holds equally many, and a dropped one is
sent nothing. How many rows go where is exchanged first. The gradient of a way is the other way. A rank that has no
token for another still takes part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Dispatch:
    """The ways of one layer's tokens.

    Args:
        counts: rows for every kept expert `[kept]`, in the order of experts; those of rank 0 come first.
        group: the expert-parallel ranks.

    Attributes:
        counts: rows of every expert that this rank holds, of all ranks.
    """

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        self.group, ranks, device = group, group.size(), counts.device
        sent = counts.view(ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=group)
        numbers = torch.cat([sent.sum(1), received.sum(1), received.sum(0)]).tolist()  # the one wait
        self._sent, self._received, self.counts = numbers[:ranks], numbers[ranks : 2 * ranks], numbers[2 * ranks :]
        # What came lies by rank, then expert: the rows of an expert are brought together.
        experts = torch.arange(sent.shape[1], device=device).repeat(ranks)
        self._order = experts.repeat_interleave(received.flatten(), output_size=sum(self.counts)).argsort(stable=True)
        self._back = self._order.argsort()

    @property
    def own(self) -> Tensor:
        """Which of the rows that came are this rank's own."""
        first = sum(self._received[: self.group.rank()])
        return (self._order >= first) & (self._order < first + self._received[self.group.rank()])

    def there(self, x: Tensor) -> Tensor:
        """Rows `[n, ...]` in the order of their experts -> the rows of this rank's experts, likewise."""
        return _Exchange.apply(x, self._sent, self._received, self.group)[self._order]

    def back(self, y: Tensor) -> Tensor:
        """The other way."""
        return _Exchange.apply(y[self._back], self._received, self._sent, self.group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        return _exchanged(dy, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
    return y
