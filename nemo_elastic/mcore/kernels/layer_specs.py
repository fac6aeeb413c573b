"""Layer specs of the plain (not elastic) hybrid stack, with and without Transformer Engine.

`hybrid_stack_spec()` is what `SSMConfig.mamba_stack_spec` takes. With Transformer Engine on a GPU it is megatron-core's
own; otherwise the same stack from Megatron's local column and row parallel linears with the norm of `norm.py` in front,
each layer as the module of its kind has it (`kind_modules`).
Transformer Engine fuses that norm into the linear behind it, so its weight has another name in a checkpoint; the key
maps of the layers (`norm_keys`) make a local stack write and read exactly the names that stock NeMo writes
(`mixer.in_proj.layer_norm_weight`, ...).

In both cases the mixer is `Mixer`: Megatron's, with its gated norm marked as split over tensor-parallel ranks, which
megatron-core 0.15 does not do. Without the mark the global gradient norm counts the norm's gradient on tensor-parallel
rank 0 only, and clipping then depends on the layout.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_elastic.config.function_fields import beyond_stock
from nemo_elastic.kinds import Kind
from nemo_elastic.mcore.kernels.kind_modules import SLOTS, module_of, stack_submodules
from nemo_elastic.mcore.kernels.multipliers import multiplier, scale_residuals
from nemo_elastic.mcore.kernels.norm import HeadNorm, RMSNorm
from nemo_elastic.mcore.versions import HybridStack, StackSubmodules, transformer_engine_spec


class Mixer(MambaMixer):
    """Megatron's Mamba mixer whose norm weight `[D/tp]` counts as split over tensor-parallel ranks."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if self.rmsnorm:
            self.norm.weight.tensor_model_parallel = True


class LocalStack(HybridStack):
    """Megatron's hybrid stack with the local norm at its end, where Megatron's own insists on Transformer Engine's.

    It follows the multipliers of a configuration.
    """

    final_norm_class: type[RMSNorm] = RMSNorm

    def __init__(
        self,
        config: TransformerConfig,
        submodules: StackSubmodules,
        *args: object,
        post_layer_norm: bool = True,
        **kwargs: object,
    ) -> None:
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        scale_residuals(self.layers, config)
        if self.post_process and post_layer_norm:
            self.final_norm = self.final_norm_class(config, config.hidden_size)
            self.final_norm.scale = 1.0 / multiplier(config, "logits_scaling")


def have_transformer_engine() -> bool:
    """Whether layers of Transformer Engine can run here: installed, and on a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def attention_backend() -> AttnBackend:
    """The one setting of all models in a process: Megatron writes it into the environment that all of them read.

    With `local` it forbids Transformer Engine every kernel; where that is installed all models, stacks of our own
    among them, leave the choice to it.
    """
    return AttnBackend.auto if have_transformer_engine() else AttnBackend.local


def local_stack_spec(pattern: str = "") -> ModuleSpec:
    """The hybrid stack from Megatron's local linears and attention, and our norm.

    Args:
        pattern: needed where it has kinds that Megatron has no letter for.
    """
    return ModuleSpec(module=LocalStack, submodules=stack_submodules(_plain_layer, pattern))


def _plain_layer(kind: Kind) -> ModuleSpec:
    return module_of(kind).plain_layer()


def transformer_engine_stack_spec(pattern: str = "", *, stock: bool = True) -> ModuleSpec:
    """megatron-core's own spec of the hybrid stack (fused norm + linear), with our `Mixer`; `pattern` as above.

    Args:
        stock: False: with a stack that follows multipliers, and the norms of heads that `qk_layernorm` means.
    """
    spec = transformer_engine_spec()
    stack = spec.submodules if stock else with_head_norms(spec.submodules)
    layer = stack.mamba_layer.submodules
    marked = replace(layer, mixer=replace(layer.mixer, module=Mixer))
    stack = replace(stack, mamba_layer=replace(stack.mamba_layer, submodules=marked))
    ours = stack_submodules(_plain_layer, pattern, others=stack)
    stack = replace(stack, **{field: getattr(ours, field) for field, _ in SLOTS.values()})
    return replace(spec, submodules=stack) if stock else replace(spec, module=LocalStack, submodules=stack)


def with_head_norms(stack: StackSubmodules) -> StackSubmodules:
    """A stack's table whose attention norms queries and keys where `qk_layernorm` says so."""
    layer = stack.attention_layer.submodules
    attention = layer.self_attention
    inner = replace(attention.submodules, q_layernorm=HeadNorm, k_layernorm=HeadNorm)
    layer = replace(layer, self_attention=replace(attention, submodules=inner))
    return replace(stack, attention_layer=replace(stack.attention_layer, submodules=layer))


def hybrid_stack_spec(config: TransformerConfig | None = None, pattern: str = "") -> ModuleSpec:
    """The spec of a plain hybrid stack that fits this machine.

    Args:
        config: with something that the stock stack would not follow, it is not the stock one. Megatron and NeMo call
            spec factories with or without it.
        pattern: needed where it has kinds that Megatron has no letter for.
    """
    if not have_transformer_engine():
        return local_stack_spec(pattern)
    return transformer_engine_stack_spec(pattern, stock=config is None or not beyond_stock(vars(config)))
