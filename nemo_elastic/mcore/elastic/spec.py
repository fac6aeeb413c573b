"""The elastic stack as a Megatron `ModuleSpec`: elasticity enters through it and nowhere else.

Norms are always our own and unfused. Linears are Megatron's local ones, or Transformer Engine's where it is there:
masked mode then runs TE's kernels, sliced mode torch's with the prefix of their weights. Both in the parameters' dtype:
the stock stack enters FP8 around its loop over the layers, ours does not, so a model that asks for it is refused.
"""

from megatron.core.transformer.spec_utils import ModuleSpec

from ...kinds import Kind
from ..kernels.kind_modules import module_of, stack_submodules
from ..kernels.layer_specs import have_transformer_engine
from .stack import ElasticStack


def elastic_stack_spec(pattern: str = "", *, local: bool = False) -> ModuleSpec:
    """The hybrid stack with every layer the elastic one of its kind; checkpoint keys are the plain ones.

    Args:
        pattern: needed where it has kinds that Megatron has no letter for.
        local: Megatron's own linears even where Transformer Engine is installed.
    """
    fused = have_transformer_engine() and not local

    def layer(kind: Kind) -> ModuleSpec:
        return module_of(kind).elastic_layer(transformer_engine=fused)

    return ModuleSpec(module=ElasticStack, submodules=stack_submodules(layer, pattern))
