"""Causal core attention through torch's own kernel, for stacks without Transformer Engine.

    softmax(q k^T / sqrt(d), causal) v        q [s, b, n, d]; k, v [s, b, g, d], n/g query heads share a key head

Under context parallelism keys and values of all ranks are gathered (`context`).

The same function as Megatron's `DotProductAttention`, which writes its mask into a view of the scores: autograd
then copies the whole `[b n, s, s]` tensor in the backward pass, a sixth of a small model's step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from nemo_elastic.mcore.kernels.context import chunk_spans, whole_sequence
from nemo_elastic.mcore.kernels.grouped_heads import ungrouped


class CausalAttention(nn.Module):
    """Drop-in for `DotProductAttention` where the mask is causal and there is no packing.

    Raises:
        ValueError: the configuration asks for another mask, or a window.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or config.window_size:
            words = "attention without Transformer Engine is causal and unwindowed; leave model.window_size unset"
            raise ValueError(words)
        self.context = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = config.softmax_scale if softmax_scale is None else softmax_scale
        # apply_query_key_layer_scaling divides and multiplies again: nothing to do here

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Query `[s, b, n/tp, d]`, key and value `[s, b, g/tp, d]` to `[s, b, n d/tp]`."""
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention without Transformer Engine takes neither a bias nor packed sequences")
        if self.context.size() == 1:
            return self._causal(query, key, value)
        key, value = whole_sequence(torch.cat([key, value], dim=-1), self.context).split(key.shape[-1], dim=-1)
        spans = chunk_spans(len(query), self.context)
        seen = [(q, key[:stop], value[:stop]) for q, (_, stop) in zip(query.chunk(2), spans, strict=True)]
        return torch.cat([self._causal(*one) for one in seen])

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The last query sees all keys, each one before it one fewer."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        k, v = ungrouped(q, k, v)
        square = len(query) == len(key)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if square else causal_lower_right(len(query), len(key)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=square,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)
