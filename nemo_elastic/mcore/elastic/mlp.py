"""The MLP of a subnet: squared-ReLU (or any elementwise) neurons, kept in whole groups."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from ...kinds import mlp as facts
from ...space.architecture import Architecture
from ...space.layout import Axis, ParamSpec
from ..kernels.kind_modules import norm_keys
from ..kernels.norm import RMSNorm
from ..kernels.observing import Observer, WidthSettings
from ..versions import mlp_arguments
from .call import LayerCall, MaskCache, inner_multiplier, times
from .layers import ElasticLayer
from .linear import column_parallel, row_parallel
from .norm import ElasticRMSNorm

NEURONS = "ffn"  # what ranks them, in the state of an interrupted ranking


class ElasticMLP(MLP):
    """Megatron's MLP; `elastic()` runs the neurons of a subnet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **mlp_arguments(kwargs))

    def bind(self, rows: dict[str, ParamSpec], axes: dict[str, Axis], tp_group: Any) -> None:
        """Learn this layer's rows of the parameter table."""
        self.rows, self.axes, self.elastic_tp_group, self.masks = rows, axes, tp_group, MaskCache()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Megatron's, its bias added here: recomputation would make a parameter that it returns a result of its own."""
        y, left = super().forward(*args, **kwargs)
        return (y if left is None else y + left), None

    def elastic(self, x: Tensor, call: LayerCall, attention_mask: Tensor | None = None) -> Tensor:
        """`[s, b, h or k]` -> `[s, b, h or k]`."""
        parallel = {"sequence_parallel": self.config.sequence_parallel, "tp_group": self.elastic_tp_group}
        weight, bias = (self.rows.get(f"mlp.linear_fc1.{part}") for part in ("weight", "bias"))
        y = self._activated(column_parallel(self.linear_fc1, x, weight, call.cut, bias=bias, **parallel))
        y = times(y, inner_multiplier(call, self.axes["ffn"], ("ffn_hidden_size",), self.masks, y))
        weight, bias = (self.rows.get(f"mlp.linear_fc2.{part}") for part in ("weight", "bias"))
        return row_parallel(self.linear_fc2, y, weight, call.cut, bias=bias, **parallel)

    def _activated(self, y: Tensor) -> Tensor:
        """`[s, b, f]` -> `[s, b, f]`; gated `[gate; up]` `[s, b, 2f]` -> `[s, b, f]`."""
        if not self.config.gated_linear_unit:
            return self.config.activation_func(y)
        gate, up = y.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up


def _not_about_mlp_type(record: logging.LogRecord) -> bool:
    """Megatron warns of any MLP class but its own, then builds it as its own, which is right for ours."""
    return "Unknown MLP type" not in record.getMessage()


class QuietMLPLayer(MLPLayer):
    """Megatron's layer around an MLP of ours, without its warning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        logger = logging.getLogger(transformer_layer.__name__)
        logger.addFilter(_not_about_mlp_type)
        try:
            super().__init__(*args, **kwargs)
        finally:
            logger.removeFilter(_not_about_mlp_type)


class ElasticMLPLayer(ElasticLayer, QuietMLPLayer):
    """Norm, MLP, residual."""

    part_names = ("pre_mlp_layernorm", "mlp", "mlp_bda")

    @property
    def recompute_sublayer(self) -> bool:
        return self.recompute_mlp


LAYER, SUBLAYER = ElasticMLPLayer, ElasticMLP


def plain_layer() -> ModuleSpec:
    """Megatron's MLP layer from local linears."""
    parts = TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(
            module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=norm_keys(facts.MLP),
    )
    return ModuleSpec(module=MLPLayer, submodules=parts)


def elastic_layer(*, transformer_engine: bool = False) -> ModuleSpec:
    """The same layer, elastic."""
    spec = plain_layer()
    spec.module, spec.submodules.pre_mlp_layernorm, spec.submodules.mlp.module = LAYER, ElasticRMSNorm, SUBLAYER
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        linears = spec.submodules.mlp.submodules
        linears.linear_fc1, linears.linear_fc2 = TEColumnParallelLinear, TERowParallelLinear
    return spec


def observe(collector: Observer, number: int, layer: nn.Module) -> None:
    """Watch a plain layer where `rank.ffn_site` says."""
    mlp = layer.mlp
    collector.watch_norm(number, layer.pre_mlp_layernorm, mlp.linear_fc1)
    if collector.settings.ffn_site == "linear_fc1_output":
        collector.on_output(mlp.linear_fc1, NEURONS, number)
    else:
        collector.on_input(mlp.linear_fc2, lambda a: collector.see(NEURONS, number, a))


def unit_scores(sites: Mapping[str, Tensor], architecture: Architecture, settings: WidthSettings) -> dict[str, Tensor]:
    """One score per neuron."""
    return {"ffn_hidden_size": sites[NEURONS]}
