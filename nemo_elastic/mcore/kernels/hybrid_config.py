"""Megatron's configuration of a hybrid model, with what its `TransformerConfig` has no field for.

Positions are arguments of Megatron's model and fields of NeMo's `SSMConfig`; the rest (`function_fields.OWN`) neither
knows. Here all stand in the configuration, which every module of a model sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class BeyondStock:
    """Fields of a model section that neither Megatron nor NeMo has; meanings in `config.function_fields`."""

    rope_scaling_factor: float | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


@dataclass
class HybridConfig(BeyondStock, TransformerConfig):
    """`TransformerConfig`, positions, and `BeyondStock`."""

    position_embedding_type: str = "none"
    rotary_percent: float = 1.0
    rotary_base: float = 10000
    seq_len_interpolation_factor: float | None = None
