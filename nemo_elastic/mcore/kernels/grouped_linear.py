"""One linear per expert in one tensor `[E, rows, columns]`, on tokens sorted by expert.

    y[of expert e] = x[of expert e] @ take(W[e])^T,    dW[e][kept] += dy^T x

As `elastic.linear` the backward adds into Megatron's gradient buffer (`weight.main_grad`) where there is one, an expert
without a token costs nothing, and the cut weight is not kept alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ...space.layout import ParamSpec
from ...space.slicing import accumulate, take

Sizes = Mapping[str, int]


class GroupedLinear(MegatronModule):
    """The weights of a linear in every expert, `[E/ep, rows, columns]`, one of both split over tensor-parallel ranks.

    Args:
        shape: of all ranks.
        split: the axis that is split, 1 (a column-parallel linear) or 2 (row-parallel).
        halves: rows are [gate; up], each of which is split.
    """

    def __init__(
        self, config: TransformerConfig, shape: tuple[int, int, int], *, split: int, init: Any, tp_group: Any,
        ep_group: Any, halves: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.split, self.halves, self.tp_group, self.ep_group = split, halves, tp_group, ep_group
        ranks = {0: ep_group.size(), split: tp_group.size()}
        local = [n // ranks.get(axis, 1) for axis, n in enumerate(shape)]
        self.weight = nn.Parameter(torch.empty(local, dtype=config.params_dtype))
        if config.perform_initialization:
            for expert in self.weight.data:
                init(expert)
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, split, 1
        # What tells Megatron's reduction and optimizer that data-parallel ranks hold other experts.
        self.weight.allreduce = ep_group.size() == 1

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One tensor over all experts, as Megatron's experts write it."""
        from megatron.core import parallel_state

        key, rank, size, axis = f"{prefix}weight", self.tp_group.rank(), self.tp_group.size(), self.split
        held = (0, self.ep_group.rank(), self.ep_group.size())
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        if not (self.halves and size > 1):
            offsets = held, (axis, rank, size)
            return {key: ShardedTensor.from_rank_offsets(key, self.weight, *offsets, replica_id=replica)}

        def build(key: str, whole: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key, half.contiguous(), held, (axis, rank + number * size, 2 * size), replica_id=replica_id
                )
                for number, half in enumerate(whole.chunk(2, dim=axis))
            ]

        merge = _merged(axis)
        return {key: ShardedTensorFactory(key, self.weight, build, merge, replica_id=replica)}


def _merged(axis: int) -> Any:
    return lambda halves: torch.cat(list(halves), dim=axis)


def grouped(
    x: Tensor, weight: Tensor, counts: Sequence[int], experts: Sequence[int], spec: ParamSpec | None, sizes: Sizes
) -> Tensor:
    """`[n, columns]` -> `[n, rows]`.

    Args:
        x: the tokens, sorted by expert.
        counts, experts: how many tokens each expert has, and which of `weight` it is.
        spec: the weight's row of the table, by which every expert is cut to `sizes`; None: whole.
    """
    return _Grouped.apply(x, weight, tuple(counts), tuple(experts), of_one_expert(spec), sizes)


def of_one_expert(spec: ParamSpec | None) -> ParamSpec | None:
    """The row of a single expert's matrix."""
    return None if spec is None else ParamSpec(spec.name, spec.layer, spec.kind, spec.axes[1:])


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple, experts: tuple, spec: Any, sizes: Sizes) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.experts, ctx.spec, ctx.sizes = counts, experts, spec, sizes
        rows = weight.shape[1] if spec is None else spec.shape(sizes)[0]
        y = x.new_empty(x.shape[0], rows)
        for expert, of_x, of_y in _runs(counts, experts, x, y):
            torch.mm(of_x, _one(weight, expert, spec, sizes).t(), out=of_y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        dy, spec, sizes = dy.contiguous(), ctx.spec, ctx.sizes
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        buffer = dw = None
        if ctx.needs_input_grad[1]:
            buffer = getattr(weight, "main_grad", None)
            dw = None if buffer is not None else torch.zeros_like(weight)
        into = dw if buffer is None else buffer
        for expert, of_x, of_dy in _runs(ctx.counts, ctx.experts, x, dy):
            if into is not None:
                gradient = of_dy.t().mm(of_x)
                accumulate(gradient, spec, sizes, into[expert]) if spec else into[expert].add_(gradient)
        if dx is not None:
            for expert, of_dx, of_dy in _runs(ctx.counts, ctx.experts, dx, dy):
                torch.mm(of_dy, _one(weight, expert, spec, sizes), out=of_dx)
        return dx, dw, None, None, None, None


def _one(weight: Tensor, expert: int, spec: ParamSpec | None, sizes: Sizes) -> Tensor:
    return weight[expert] if spec is None else take(weight[expert], spec, sizes)


def _runs(counts: tuple, experts: tuple, *tensors: Tensor) -> Any:
    """(expert, its rows of each tensor) of every expert with a token."""
    start = 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            yield (expert, *(t[start : start + count] for t in tensors))
        start += count
