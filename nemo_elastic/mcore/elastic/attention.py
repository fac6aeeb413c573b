"""Self attention of a subnet: query heads kept in whole KV groups; keys and values are never cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from ...importance.scores import attention_head_scores
from ...kinds import attention as facts
from ...space.architecture import Architecture
from ...space.layout import Axis, ParamSpec
from ..kernels.attention import CausalAttention
from ..kernels.kind_modules import norm_keys
from ..kernels.norm import HeadNorm, RMSNorm
from ..kernels.observing import Observer, WidthSettings
from .call import LayerCall, MaskCache, inner_multiplier, times
from .layers import ElasticLayer
from .linear import column_parallel, row_parallel
from .norm import ElasticRMSNorm

CHANNELS = "attention"  # what ranks the heads, in the state of an interrupted ranking


class ElasticSelfAttention(SelfAttention):
    """Megatron's self attention; `elastic()` runs the query heads of a subnet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Transformer Engine's kernel is built for one number of heads; this one takes what it is given.
        self.sliced_attention = CausalAttention(
            self.config, self.layer_number, self.attn_mask_type, self.attention_type
        )

    def bind(self, rows: dict[str, ParamSpec], axes: dict[str, Axis], tp_group: Any) -> None:
        """Learn this layer's rows of the parameter table."""
        self.rows, self.axes, self.elastic_tp_group, self.masks = rows, axes, tp_group, MaskCache()

    def elastic(self, x: Tensor, call: LayerCall, attention_mask: Tensor | None = None) -> Tensor:
        """`[s, b, h or k]` -> `[s, b, h or k]`."""
        parallel = {"sequence_parallel": self.config.sequence_parallel, "tp_group": self.elastic_tp_group}
        weight, bias = (self.rows.get(f"self_attention.linear_qkv.{part}") for part in ("weight", "bias"))
        q, k, v = self._split(column_parallel(self.linear_qkv, x, weight, call.cut, bias=bias, **parallel))
        if self.config.qk_layernorm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if call.rotary is not None:
            q, k = (apply_rotary_pos_emb(t, call.rotary, self.config, cp_group=self.pg_collection.cp) for t in (q, k))
        y = self._attend(self.sliced_attention if call.sliced else self.core_attention, q, k, v, attention_mask)
        y = times(y, inner_multiplier(call, self.axes["q"], ("num_attention_heads",), self.masks, y))
        weight, bias = (self.rows.get(f"self_attention.linear_proj.{part}") for part in ("weight", "bias"))
        return row_parallel(self.linear_proj, y, weight, call.cut, bias=bias, **parallel)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[s, b, groups (r + 2) d]` -> queries `[s, b, groups r, d]`, keys and values `[s, b, groups, d]`."""
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = qkv.shape[-1] // (groups * d)
        q, k, v = qkv.unflatten(-1, (groups, per_group, d)).split([per_group - 2, 1, 1], dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _attend(self, kernel: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel(q, k, v, attention_mask, attn_mask_type=self.attn_mask_type)

        if self.checkpoint_core_attention and self.training and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(run, False, q, k, v)
        return run(q, k, v)


class ElasticAttentionLayer(ElasticLayer, TransformerLayer):
    """Norm, self attention, residual."""

    part_names = ("input_layernorm", "self_attention", "self_attn_bda")


LAYER, SUBLAYER = ElasticAttentionLayer, ElasticSelfAttention


def plain_layer() -> ModuleSpec:
    """Megatron's attention layer from local linears, with torch's attention kernel."""
    parts = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=CausalAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=HeadNorm,
                k_layernorm=HeadNorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=norm_keys(facts.ATTENTION),
    )
    return ModuleSpec(module=TransformerLayer, submodules=parts)


def elastic_layer(*, transformer_engine: bool = False) -> ModuleSpec:
    """The same layer, elastic."""
    spec = plain_layer()
    parts = spec.submodules
    spec.module, parts.input_layernorm, parts.self_attention.module = LAYER, ElasticRMSNorm, SUBLAYER
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TERowParallelLinear,
        )

        inner = parts.self_attention.submodules
        inner.linear_qkv, inner.linear_proj = TEColumnParallelLinear, TERowParallelLinear
        inner.core_attention = TEDotProductAttention
    return spec


def observe(collector: Observer, number: int, layer: nn.Module) -> None:
    """Watch what enters a plain layer's `linear_proj`."""
    attention = layer.self_attention
    collector.watch_norm(number, layer.input_layernorm, attention.linear_qkv)
    collector.on_input(attention.linear_proj, lambda a: collector.see(CHANNELS, number, a))


def unit_scores(sites: Mapping[str, Tensor], architecture: Architecture, settings: WidthSettings) -> dict[str, Tensor]:
    """One score per query head."""
    return {"num_attention_heads": attention_head_scores(sites[CHANNELS].view(architecture.num_attention_heads, -1))}
