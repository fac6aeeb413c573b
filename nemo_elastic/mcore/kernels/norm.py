"""RMSNorm for Megatron layers that run without Transformer Engine, and the gated norm of Mamba's mixer.

    y = x / sqrt(mean(x^2) + eps) * weight        over the last axis, in fp32 (fp64 stays), cast back to x's dtype

megatron-core's own fallback, `WrappedTorchNorm`, refuses sequence parallelism: there each tensor-parallel rank sees
its own part of the sequence, so the gradient of the (replicated) weight is a partial sum. Megatron all-reduces it for
parameters that carry `sequence_parallel=True`, which is what `RMSNorm` sets.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from nemo_elastic.mcore.kernels.gated_norm import RMSNormGated


class RMSNorm(nn.Module):
    """RMSNorm of `[s, b, h]` or `[s/tp, b, h]`, with the weight marked for sequence parallelism.

    Args:
        config: gives dtype, `layernorm_epsilon` and `sequence_parallel`.
        hidden_size: h.
        eps: overrides `config.layernorm_epsilon` (Megatron's Mamba layer passes none, its transformer layer does).

    Attributes:
        scale: multiplies the output before it is rounded (`multipliers`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> None:
        super().__init__()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"model.normalization={config.normalization!r} with layernorm_zero_centered_gamma="
                f"{config.layernorm_zero_centered_gamma} needs Transformer Engine; without it set "
                "model.normalization=RMSNorm and model.layernorm_zero_centered_gamma=false"
            )
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.scale = 1.0
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        y = y * self.weight.to(y.dtype)
        return (y if self.scale == 1.0 else y * self.scale).to(x.dtype)


class HeadNorm:
    """The norm of a head's queries or keys `[.., d]`, where `qk_layernorm` asks for one; else None.

    Megatron builds what a spec names whatever the flag says, and nothing where it names none whatever the flag says.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> RMSNorm | None:
        """Called as Megatron builds a norm."""
        return RMSNorm(config, hidden_size, eps) if config.qk_layernorm else None


class MixerNorm(RMSNormGated):
    """The mixer's grouped gated RMSNorm, with the checkpoint layout of Megatron's `ExtendedRMSNorm`."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """`weight` is split over tensor-parallel ranks along its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
