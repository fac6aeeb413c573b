"""Names that differ between lines of megatron-core, in one place.

| here | 0.15 | later |
|---|---|---|
| `hybrid_model_class()` | `models.mamba.MambaModel` | `models.hybrid.HybridModel` |
| `pattern_argument()` | `hybrid_override_pattern` | `hybrid_layer_pattern` |
| `conv_parameters(mixer)` | `mixer.conv1d.weight`, `.bias` | `mixer.conv1d_weight`, `mixer.conv1d_bias` |

Checkpoint keys are the same in both lines. The project is tested with the first column. Names of Megatron that NeMo's
side of the package passes on (configs and activations) are re-exported here, so that only `mcore` imports Megatron.
"""

from __future__ import annotations

import importlib
import inspect

import megatron.core
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import nn

__all__ = [
    "AttnBackend",
    "DistributedDataParallelConfig",
    "OptimizerConfig",
    "conv_parameters",
    "hybrid_model_class",
    "installed",
    "pattern_argument",
    "squared_relu",
]

TESTED = "0.15.3"


def installed() -> str:
    """The version of megatron-core that is imported."""
    return megatron.core.__version__


def hybrid_model_class() -> type[nn.Module]:
    """The hybrid language model: embedding, stack, output layer."""
    for module, name in (("megatron.core.models.mamba", "MambaModel"), ("megatron.core.models.hybrid", "HybridModel")):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(
        f"megatron-core {installed()} has neither MambaModel nor HybridModel; install megatron-core=={TESTED}"
    )


def pattern_argument() -> str:
    """The keyword of the hybrid model that takes the layer pattern, such as `M-M*`."""
    accepted = inspect.signature(hybrid_model_class().__init__).parameters
    return "hybrid_layer_pattern" if "hybrid_layer_pattern" in accepted else "hybrid_override_pattern"


def conv_parameters(mixer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight `[x+B+C, 1, d_conv]` and bias `[x+B+C]` of a mixer's causal convolution (per tensor-parallel rank)."""
    if hasattr(mixer, "conv1d_weight"):
        return mixer.conv1d_weight, mixer.conv1d_bias
    return mixer.conv1d.weight, mixer.conv1d.bias
