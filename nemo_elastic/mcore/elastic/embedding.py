"""Token embedding cut to a subnet: only the kept channels are looked up, summed over ranks and given a gradient.

    y = W[ids, :k],   dW[ids, :k] += dy

The gradient is added to the rows that occur, straight in Megatron's buffer where there is one: the dense
`[v, h]` gradient of a stock embedding would cost the parent's size whatever the subnet.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, autograd, nn, zeros_like

from ...space.layout import ParamSpec
from ...space.slicing import is_whole, take
from ..kernels.multipliers import multiplier
from .linear import Sizes


class _SlicedEmbedding(autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, elsewhere: Tensor | None, weight: Tensor, spec: ParamSpec, sizes: Sizes) -> Any:
        ctx.save_for_backward(ids, elsewhere, weight)
        ctx.spec, ctx.sizes = spec, sizes
        y = F.embedding(ids, take(weight, spec, sizes))
        return y if elsewhere is None else y.masked_fill_(elsewhere.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        ids, elsewhere, weight = ctx.saved_tensors
        if elsewhere is not None:
            dy = dy.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        buffer = getattr(weight, "main_grad", None)
        whole = zeros_like(weight) if buffer is None else buffer
        kept = take(whole, ctx.spec, ctx.sizes)  # a prefix of the channels is a view
        kept.index_add_(0, ids.flatten(), dy.flatten(0, -2).to(kept.dtype))
        return None, None, whole if buffer is None else None, None, None


def embed(embedding: nn.Module, ids: Tensor, position_ids: Tensor | None, spec: ParamSpec, sizes: Sizes) -> Tensor:
    """Token ids `[b, s]` -> `[s, b, k]`, `[s/tp, b, k]` under sequence parallelism, as Megatron's embedding does."""
    if is_whole(spec, sizes):
        return embedding(input_ids=ids, position_ids=position_ids)
    config, words = embedding.config, embedding.word_embeddings
    elsewhere = None
    if words.tp_group.size() > 1:
        elsewhere = (ids < words.vocab_start_index) | (ids >= words.vocab_end_index)
        ids = (ids - words.vocab_start_index).masked_fill(elsewhere, 0)
    x = _SlicedEmbedding.apply(ids, elsewhere, words.weight, spec, sizes).transpose(0, 1).contiguous()
    if words.reduce_scatter_embeddings:
        x = reduce_scatter_to_sequence_parallel_region(x, group=words.tp_group)
    else:
        x = reduce_from_tensor_model_parallel_region(x, group=words.tp_group)
    factor = multiplier(config, "embedding_multiplier")  # on the module's own output it is a hook
    x = x if factor == 1.0 else x * factor
    if config.fp32_residual_connection:
        x = x.float()
    if not config.sequence_parallel:
        return embedding.embedding_dropout(x)
    if not words.reduce_scatter_embeddings and embedding.scatter_to_sequence_parallel:
        x = scatter_to_sequence_parallel_region(x, group=words.tp_group)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        return embedding.embedding_dropout(x)
