"""The MLP of a subnet: squared-ReLU (or any elementwise) neurons, kept in whole groups."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from ...layout import Axis, ParamSpec
from ..versions import mlp_arguments
from .call import LayerCall, MaskCache, inner_multiplier, times
from .linear import column_parallel, row_parallel


class ElasticMLP(MLP):
    """Megatron's MLP; `elastic()` runs the neurons of a subnet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **mlp_arguments(kwargs))

    def bind(self, rows: dict[str, ParamSpec], axes: dict[str, Axis], tp_group: Any) -> None:
        """Learn this layer's rows of the parameter table."""
        self.rows, self.axes, self.elastic_tp_group, self.masks = rows, axes, tp_group, MaskCache()

    def elastic(self, x: Tensor, call: LayerCall, attention_mask: Tensor | None = None) -> Tensor:
        """`[s, b, h or k]` -> `[s, b, h or k]`."""
        parallel = {"sequence_parallel": self.config.sequence_parallel, "tp_group": self.elastic_tp_group}
        up, down = self.rows["mlp.linear_fc1.weight"], self.rows["mlp.linear_fc2.weight"]
        if call.sliced:
            y = column_parallel(self.linear_fc1, x, up, call.sizes, **parallel)
        else:
            y = self.linear_fc1(x)[0]
        y = self.config.activation_func(y)
        y = times(y, inner_multiplier(call, self.axes["ffn"], ("ffn_hidden_size",), self.masks, y))
        if call.sliced:
            return row_parallel(self.linear_fc2, y, down, call.sizes, **parallel)
        return self.linear_fc2(y)[0]
