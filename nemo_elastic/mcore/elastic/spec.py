"""The elastic stack as a Megatron `ModuleSpec`: elasticity enters through it and nowhere else.

Norms are always our own and unfused. Linears are Megatron's local ones, or Transformer Engine's where it is there:
masked mode then runs TE's kernels, sliced mode torch's with the prefix of their weights. Both in the parameters' dtype:
the stock stack enters FP8 around its loop over the layers, ours does not, so a model that asks for it is refused.
"""

import copy

from megatron.core.transformer.spec_utils import ModuleSpec

from ..layer_specs import have_transformer_engine, local_stack_spec
from .attention import ElasticSelfAttention
from .layers import ElasticAttentionLayer, ElasticMambaLayer, ElasticMLPLayer
from .mixer import ElasticMixer
from .mlp import ElasticMLP
from .norm import ElasticRMSNorm
from .stack import ElasticStack


def elastic_stack_spec(*, local: bool = False) -> ModuleSpec:
    """The local hybrid stack with every part replaced by its elastic subclass; checkpoint keys are the plain ones.

    Args:
        local: Megatron's own linears even where Transformer Engine is installed.
    """
    spec = copy.deepcopy(local_stack_spec())
    spec.module = ElasticStack
    mamba, attention, mlp = (
        spec.submodules.mamba_layer,
        spec.submodules.attention_layer,
        spec.submodules.mlp_layer,
    )
    mamba.module, attention.module, mlp.module = ElasticMambaLayer, ElasticAttentionLayer, ElasticMLPLayer
    mamba.submodules.norm = ElasticRMSNorm
    mamba.submodules.mixer.module = ElasticMixer
    attention.submodules.input_layernorm = ElasticRMSNorm
    attention.submodules.self_attention.module = ElasticSelfAttention
    mlp.submodules.pre_mlp_layernorm = ElasticRMSNorm
    mlp.submodules.mlp.module = ElasticMLP
    if have_transformer_engine() and not local:
        _use_transformer_engine(mamba, attention, mlp)
    return spec


def _use_transformer_engine(mamba: ModuleSpec, attention: ModuleSpec, mlp: ModuleSpec) -> None:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TERowParallelLinear,
    )

    mamba.submodules.mixer.submodules.in_proj = TEColumnParallelLinear
    mamba.submodules.mixer.submodules.out_proj = TERowParallelLinear
    parts = attention.submodules.self_attention.submodules
    parts.linear_qkv, parts.linear_proj = TEColumnParallelLinear, TERowParallelLinear
    parts.core_attention = TEDotProductAttention
    mlp.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    mlp.submodules.mlp.submodules.linear_fc2 = TERowParallelLinear
