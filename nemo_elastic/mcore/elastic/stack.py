"""The hybrid stack run as a subnet: kept layers only, the residual stream at the subnet's width when sliced.

Dropped layers stay where the parent has them (pipeline stages do not move) and are simply not called. Full activation
recomputation, which the stock hybrid stack silently ignores, is done here layer by layer.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from ...space.layout import ParamLayout
from ..kernels.layer_specs import LocalStack
from .call import LayerCall, MaskCache, times
from .layers import packed, unpacked
from .norm import ElasticRMSNorm
from .plan import Plan


class ElasticStack(LocalStack):
    """Megatron's hybrid stack; a forward with `elastic=plan` runs the plan."""

    final_norm_class = ElasticRMSNorm

    def bind(self, layout: ParamLayout, tp_group: Any) -> None:
        """Give every layer its rows of the (tensor-parallel) parameter table."""
        self.layout, self.elastic_tp_group, self.masks = layout, tp_group, MaskCache()
        for layer in self.layers:
            layer.bind(layout, tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        elastic: Plan | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[s, b, h]`; sliced: `[s, b, k]` in and out. Without a plan: the stock forward.

        `rotary_pos_emb`: the angles of positions, where the model has some.
        """
        if elastic is None and not self._recomputes_all():
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        x = hidden_states if self.pre_process else self.input_tensor
        if elastic is None:
            return self._whole(x, attention_mask, rotary_pos_emb)
        plan, values = elastic, self._values(elastic)
        hidden_mask = self._hidden_mask(plan, values, x)
        outer = LayerCall(plan.outer, values, hidden_mask)
        if self.pre_process:
            x = times(x, hidden_mask)
        ran = False
        for layer in self.layers:
            layer_plan = plan.layers.get(layer.layer_number - 1)
            if layer_plan is None:
                continue
            ran = True
            call = LayerCall(layer_plan, values, hidden_mask, rotary_pos_emb)
            if self._recomputes_all():
                run = _replayable(layer, call, attention_mask)
                x = tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, x, *packed(call))
            else:
                x = layer.elastic(x, call, attention_mask)
        if self.post_process and self.post_layer_norm:
            x = self.final_norm.elastic(x, outer, self.layout.table["decoder.final_norm.weight"])
        elif not ran:
            x = x.clone()  # a stage without a kept layer must not hand on the very tensor it received
        return make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)

    def _whole(self, x: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor | None) -> Tensor:
        """The parent, with full recomputation."""
        for layer in self.layers:

            def run(x: Tensor, layer: Any = layer) -> Tensor:
                y = layer(hidden_states=x, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
                return y[0] if isinstance(y, tuple) else y

            x = tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, x)
        if self.post_process and self.post_layer_norm:
            x = self.final_norm(x)
        return make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)

    def _recomputes_all(self) -> bool:
        return self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled()

    def _values(self, plan: Plan) -> Tensor | None:
        """`[2, n]`: packed values for replicated and for split activations.

        Under sequence parallelism a rank holds a part of the sequence even of "replicated" activations.
        """
        if plan.values is None:
            return None
        split = copy_to_tensor_model_parallel_region(plan.values, group=self.elastic_tp_group)
        return torch.stack([split if self.config.sequence_parallel else plan.values, split])

    def _hidden_mask(self, plan: Plan, values: Tensor | None, like: Tensor) -> Tensor | None:
        """`[h]` multiplier of the residual stream; None when there is nothing to multiply."""
        if plan.mode == "sliced":
            return None
        axis = self.layout.axes["hidden"]
        if not plan.soft:
            return self.masks.prefix(axis, plan.outer.sizes, like)
        mask = None if values is None else plan.outer.value(values[0], "hidden_size")
        return self.masks.ones(self.config.hidden_size, like) if mask is None else mask


def _replayable(layer: Any, call: LayerCall, attention_mask: Tensor | None) -> Any:
    return lambda x, *tensors: layer.elastic(x, unpacked(call, tensors), attention_mask)
