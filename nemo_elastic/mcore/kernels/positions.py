"""Rotary positions in Megatron: the angles `[s, 1, 1, d]` that attention turns the first d channels of q and k by.

Megatron's module has three of the four values of Llama 3.1's scaling fixed, and its hybrid model takes no scaling at
all; here all come from the configuration (`hybrid_config`), by the formula of `rotary`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from .rotary import scaled


class Rotary(RotaryEmbedding):
    """Megatron's module with the frequencies of a configuration. It has no parameters and nothing in a checkpoint."""

    def __init__(self, config: TransformerConfig, cp_group: Any = None) -> None:
        super().__init__(
            kv_channels=config.kv_channels,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=cp_group,
        )
        if getattr(config, "rope_scaling_factor", None) is not None:
            self.inv_freq = scaled(
                self.inv_freq,
                factor=config.rope_scaling_factor,
                low=config.rope_low_freq_factor,
                high=config.rope_high_freq_factor,
                length=config.rope_original_max_position_embeddings,
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, which keeps what it made: angles made in inference mode could not take part in training."""
        with torch.inference_mode(False), torch.no_grad():
            return super().forward(*args, **kwargs)


def position_arguments(config: TransformerConfig) -> dict[str, Any]:
    """Arguments of Megatron's hybrid model; a configuration without positions is one of none."""
    if getattr(config, "position_embedding_type", "none") == "none":
        return {"position_embedding_type": "none"}
    names = ("position_embedding_type", "rotary_percent", "rotary_base", "seq_len_interpolation_factor")
    return {name: getattr(config, name) for name in names}


def angles(model: nn.Module, hidden: Tensor) -> Tensor | None:
    """The angles for hidden states `[s, b, ..]` (`[s/tp, b, ..]`) of a hybrid model; None without positions."""
    if model.position_embedding_type == "none":
        return None
    config = model.config
    length = hidden.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    return model.rotary_pos_emb(length * config.context_parallel_size)
