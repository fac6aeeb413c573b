"""The mixture of experts of a subnet: the first experts of every group, and the first neurons of each.

Routing is over the kept experts alone in every hard plan, masked ones too, so that no bias brings a dropped expert a
token, and the weights are renormalised as the parent does. Under soft masks an expert's mask multiplies its score, and
what decides the choice falls with its logarithm: at 0 and 1 that is the hard plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from ...kinds import experts as facts
from ...kinds.experts import COUNT, NEURONS, SHARED
from ...space.architecture import Architecture
from ...space.layout import Axis, ParamSpec
from ..kernels.kind_modules import norm_keys
from ..kernels.mixture import Mixture
from ..kernels.norm import RMSNorm
from ..kernels.observing import Observer, WidthSettings
from ..kernels.routing import chosen, kept_experts, logits
from .call import LayerCall, MaskCache, inner_multiplier, times
from .layers import ElasticLayer
from .linear import column_parallel, row_parallel, taken
from .mlp import QuietMLPLayer
from .norm import ElasticRMSNorm

# What ranks them, in the state of an interrupted ranking: of every expert the norms that it added and its tokens, and
# of its neurons.
ADDED, TOKENS, INSIDE = "added", "tokens", "inside"


class ElasticMixture(Mixture):
    """The mixture; `elastic()` runs the experts of a subnet."""

    def bind(self, rows: dict[str, ParamSpec], axes: dict[str, Axis], tp_group: Any) -> None:
        """Learn this layer's rows of the parameter table."""
        self.rows, self.axes, self.elastic_tp_group, self.masks = rows, axes, tp_group, MaskCache()
        self.router.elastic = True
        self._indices: dict[Any, Tensor] = {}

    def elastic(self, x: Tensor, call: LayerCall, attention_mask: Tensor | None = None) -> Tensor:
        """`[s, b, h or k]` -> `[s, b, h or k]`."""
        flat = x.reshape(-1, x.shape[-1])
        experts, weights, routed = self._routed(flat, call)
        tokens = self._product("fc1_latent_proj", flat, call)

        def inner(y: Tensor) -> Tensor:
            return times(y, inner_multiplier(call, self.axes["expert_ffn"], (NEURONS,), self.masks, y))

        fc1, fc2 = (self.rows[f"mlp.experts.experts.{name}.weight"] for name in ("linear_fc1", "linear_fc2"))
        sizes = {name: size for name, size in call.cut.items() if name != COUNT}
        out = self.mixed(tokens, weights, routed, experts, fc1, fc2, sizes, inner)
        gate = None if call.plan.soft else call.replicated(COUNT)
        out = times(self._product("fc2_latent_proj", out, call), gate).view(*x.shape[:-1], -1)
        return out if self.shared_experts is None else out + self._shared(x, call)

    def _routed(self, flat: Tensor, call: LayerCall) -> tuple[list[int], Tensor, Tensor]:
        """The kept experts, and of each token their weights and which are chosen, both `[n, kept]`."""
        row, bias = self.rows["mlp.router.weight"], self.router.bias
        experts = kept_experts(self.axes["expert"], {} if call.plan.soft else call.sizes)
        index = self._index(experts, flat.device)
        weight = taken(self.router.weight, row, call.cut)
        scores = logits(flat, weight)
        if len(experts) < scores.shape[1]:
            scores = scores.index_select(1, index)  # masked: the router is whole
        if bias is not None:
            bias = bias.index_select(0, index)
        mask = call.replicated(COUNT) if call.plan.soft else None
        if mask is not None:
            mask = mask.repeat(len(experts) // len(mask))
        weights, places = chosen(self.config, scores, bias, mask)
        self.router.count(places, index)
        return experts, weights, places

    def _index(self, experts: list[int], device: torch.device) -> Tensor:
        """Kept experts on the device, made once: a list as an index is copied there, and waited for, every time."""
        key = (len(experts), device)
        if key not in self._indices:
            with torch.inference_mode(False):
                self._indices[key] = torch.tensor(experts, device=device)
        return self._indices[key]

    def _product(self, name: str, x: Tensor, call: LayerCall) -> Tensor:
        """To the latent channels or back; `x` itself where there are none."""
        row = self.rows.get(f"mlp.{name}.weight")
        return x if row is None else x @ taken(getattr(self, name).weight, row, call.cut).t()

    def _shared(self, x: Tensor, call: LayerCall) -> Tensor:
        parallel = {"sequence_parallel": self.config.sequence_parallel, "tp_group": self.elastic_tp_group}
        fc1, fc2 = (self.rows[f"mlp.shared_experts.{name}.weight"] for name in ("linear_fc1", "linear_fc2"))
        y = self.activated(column_parallel(self.shared_experts.linear_fc1, x, fc1, call.cut, **parallel))
        y = times(y, inner_multiplier(call, self.axes["shared_ffn"], (SHARED,), self.masks, y))
        return row_parallel(self.shared_experts.linear_fc2, y, fc2, call.cut, **parallel)


class ElasticMixtureLayer(ElasticLayer, QuietMLPLayer):
    """Norm, mixture, residual."""

    part_names = ("pre_mlp_layernorm", "mlp", "mlp_bda")

    @property
    def recompute_sublayer(self) -> bool:
        return self.recompute_mlp


LAYER, SUBLAYER = ElasticMixtureLayer, ElasticMixture
OWN_LAYER = True


def _spec(layer: type, norm: type, mixture: type) -> ModuleSpec:
    parts = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=mixture),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=norm_keys(facts.EXPERTS),
    )
    return ModuleSpec(module=layer, submodules=parts)


def plain_layer() -> ModuleSpec:
    """The layer, not elastic."""
    return _spec(QuietMLPLayer, RMSNorm, Mixture)


def elastic_layer(*, transformer_engine: bool = False) -> ModuleSpec:
    """The same layer, elastic; its products are torch's, with and without Transformer Engine."""
    return _spec(LAYER, ElasticRMSNorm, SUBLAYER)


def observe(collector: Observer, number: int, layer: nn.Module) -> None:
    """Watch a plain layer: what every expert adds to the tokens that go to it, and by which of its neurons."""
    mixture, arch = layer.mlp, collector.local.architecture
    collector.plain_sums({ADDED: None, TOKENS: None, INSIDE: 1})
    collector.watch_norm(number, layer.pre_mlp_layernorm, mixture)

    def watch(experts: Tensor, neurons: Tensor, outputs: Tensor) -> None:
        def per_expert(values: Tensor) -> Tensor:
            found = values.new_zeros(arch.num_moe_experts, *values.shape[1:]).index_add_(0, experts, values)
            if mixture.ep_group.size() > 1:  # each rank saw its own experts
                torch.distributed.all_reduce(found, group=mixture.ep_group)
            return found

        # A copy: the sum over ranks is taken in place.
        whole = reduce_from_tensor_model_parallel_region(outputs.double().clone(), group=mixture.tp_group)
        if mixture.config.moe_latent_size:
            whole = whole @ mixture.fc2_latent_proj.weight.detach().double().t()
        collector.add(ADDED, number, per_expert(whole.norm(dim=-1)))
        collector.add(TOKENS, number, per_expert(torch.ones_like(whole[:, 0])))
        collector.add(INSIDE, number, per_expert(neurons.double().abs()))

    mixture.watch = watch
    collector.at_the_end(lambda: setattr(mixture, "watch", None))
    if mixture.shared_experts is not None:
        collector.on_input(mixture.shared_experts.linear_fc2, lambda a: collector.see(SHARED, number, a))


def unit_scores(sites: Mapping[str, Tensor], architecture: Architecture, settings: WidthSettings) -> dict[str, Tensor]:
    """REAP for experts `[E]`: the mean over their tokens of weight x norm of the output (arXiv 2510.13999).

    Neurons `[E, f]`: the sum over tokens of |activation| x weight; of the shared expert as of an MLP.
    """
    found = {COUNT: sites[ADDED] / sites[TOKENS].clamp_min(1), NEURONS: sites[INSIDE]}
    return found | ({SHARED: sites[SHARED]} if SHARED in sites else {})
