"""What all layer kinds share: norm, sub-layer, residual. One function runs all of them for a subnet.

    x <- x + gate * mask * sublayer(norm(x))

They stay Megatron's layer classes, each in the module of its kind (the stock stack, checkpoints and cuda graphs know
them); a call without a plan is the stock forward.
"""

from typing import Any

from megatron.core import tensor_parallel
from torch import Tensor, nn

from ...kinds import kind_of
from ...space.layout import ParamLayout
from .call import LayerCall, times


class ElasticLayer(nn.Module):
    """What the kinds share. `part_names`: attributes of norm, sub-layer and bias-dropout-add."""

    part_names: tuple[str, str, str]

    def bind(self, layout: ParamLayout, tp_group: Any) -> None:
        """Learn this layer's rows of the table; `layer_number` is global and starts at 1."""
        layer = self.layer_number - 1
        prefix = f"decoder.layers.{layer}."
        rows = {n.removeprefix(prefix): spec for n, spec in layout.table.items() if spec.layer == layer}
        kind = layout.architecture.hybrid_override_pattern[layer]
        self.norm_row = rows[kind_of(kind).norm[0]]
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
