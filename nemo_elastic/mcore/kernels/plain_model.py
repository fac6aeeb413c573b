"""Megatron's hybrid model with what it cannot say: scaled rotary positions, multipliers, a padded vocabulary."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ...space.layout import ParamLayout
from ..versions import HybridModel
from .multipliers import scale_embedding
from .padded_vocabulary import masked
from .positions import Rotary, position_arguments


class PlainModel(HybridModel):
    """Megatron's hybrid model, of which the configuration says all: positions, multipliers (`hybrid_config`).

    Args:
        layout: the table of a tensor-parallel shard, which says how much of the vocabulary is padding; None: nothing.
        others: those of Megatron's model but for positions; its `vocab_size` is the padded one. The spec's stack must
            follow the multipliers (`layer_specs.LocalStack`).
    """

    def __init__(self, config: TransformerConfig, *args: Any, layout: ParamLayout | None = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs, **position_arguments(config))
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb = Rotary(config, self.pg_collection.cp)
        if self.pre_process:
            scale_embedding(self.embedding, config)
        self.vocab_padding = 0
        if layout is not None:
            assert self.vocab_size == layout.padded_vocab_size, "the vocabulary must be the table's"
            self.real_vocab_size = layout.architecture.vocab_size
            self.vocab_padding = layout.vocab_padding(self.pg_collection.tp.rank())

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As Megatron's own; logits of padding are out of every softmax."""
        if not self.vocab_padding or not self.post_process:
            return super().forward(*args, labels=labels, **kwargs)
        logits = masked(super().forward(*args, **kwargs), self.vocab_padding)
        if labels is None:
            return logits
        return self.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())
