"""The three layer kinds: norm, sub-layer, residual. One function runs all of them for a subnet.

    x <- x + gate * mask * sublayer(norm(x))

They stay Megatron's layer classes (the stock stack, checkpoints and cuda graphs know them); a call without a plan is
the stock forward.
"""

import logging
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from ...layout import FUSED_NORM_NAMES, ParamLayout
from .call import LayerCall, times


class ElasticLayer(nn.Module):
    """What the three kinds share. `part_names`: attributes of norm, sub-layer and bias-dropout-add."""

    part_names: tuple[str, str, str]

    def bind(self, layout: ParamLayout, tp_group: Any) -> None:
        """Learn this layer's rows of the table; `layer_number` is global and starts at 1."""
        layer = self.layer_number - 1
        prefix = f"decoder.layers.{layer}."
        rows = {n.removeprefix(prefix): spec for n, spec in layout.table.items() if spec.layer == layer}
        kind = layout.architecture.hybrid_override_pattern[layer]
        self.norm_row = rows[FUSED_NORM_NAMES[kind][0]]
        getattr(self, self.part_names[1]).bind(rows, layout.axes, tp_group)

    def elastic(self, x: Tensor, call: LayerCall, attention_mask: Tensor | None = None) -> Tensor:
        """`[s, b, h]` (masked) or `[s, b, k]` (sliced), to the same shape."""
        norm, sublayer, add = (getattr(self, name) for name in self.part_names)
        normed = norm.elastic(x.to(self.config.params_dtype), call, self.norm_row)
        if self.recompute_sublayer and self.training:
            out = tensor_parallel.checkpoint(
                lambda y, *tensors: sublayer.elastic(y, unpacked(call, tensors), attention_mask),
                False,
                normed,
                *packed(call),
            )
        else:
            out = sublayer.elastic(normed, call, attention_mask)
        out = times(times(out, call.hidden_mask), call.layer_gate())
        with self.bias_dropout_add_exec_handler():
            return add(self.training, self.config.bias_dropout_fusion)((out, None), x, self.hidden_dropout)

    @property
    def recompute_sublayer(self) -> bool:
        """Whether selective recomputation drops this sub-layer's activations."""
        return False


def packed(call: LayerCall) -> tuple[Tensor, ...]:
    """The tensors of a call, as arguments of recomputation: what is closed over is replayed with its old graph."""
    return tuple(t for t in (call.values, call.hidden_mask) if t is not None)


def unpacked(call: LayerCall, tensors: tuple[Tensor, ...]) -> LayerCall:
    """The same call on the tensors that recomputation hands in."""
    rest = list(tensors)
    values = rest.pop(0) if call.values is not None else None
    return call.with_tensors(values, rest.pop(0) if call.hidden_mask is not None else None)


class ElasticMambaLayer(ElasticLayer, MambaLayer):
    """Norm, Mamba mixer, residual."""

    part_names = ("norm", "mixer", "mamba_bda")


class ElasticAttentionLayer(ElasticLayer, TransformerLayer):
    """Norm, self attention, residual."""

    part_names = ("input_layernorm", "self_attention", "self_attn_bda")


def _not_about_mlp_type(record: logging.LogRecord) -> bool:
    """Megatron warns of any MLP class but its own, then builds it as its own, which is right for a subclass."""
    return "Unknown MLP type" not in record.getMessage()


class ElasticMLPLayer(ElasticLayer, MLPLayer):
    """Norm, MLP, residual."""

    part_names = ("pre_mlp_layernorm", "mlp", "mlp_bda")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        logger = logging.getLogger(transformer_layer.__name__)
        logger.addFilter(_not_about_mlp_type)
        try:
            super().__init__(*args, **kwargs)
        finally:
            logger.removeFilter(_not_about_mlp_type)

    @property
    def recompute_sublayer(self) -> bool:
        return self.recompute_mlp
