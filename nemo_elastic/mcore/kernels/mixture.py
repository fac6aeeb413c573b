"""The mixture of experts behind a layer's norm: router, experts, shared expert. Its elastic form is `elastic.experts`.

    y = sum over chosen e of w_e fc2_e(act(fc1_e(x)))  +  shared_fc2(act(shared_fc1(x)))

A tensor-parallel rank has a part of each expert's neurons: tokens are gathered once in front and summed once behind, as
around an MLP. An expert-parallel rank has a block of the experts, and tokens are sent there and back in between
(`dispatch.py`); with one such rank none is sent anywhere. Experts lie in one tensor per linear, so that the table
cuts them as any other axis, and a checkpoint has the keys and shapes of Megatron's own experts. The tests hold it
against Megatron's `MoELayer`, in whose dispatchers and experts a dropped expert could not be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from .dispatch import Dispatch
from .grouped_linear import GroupedLinear, grouped
from .routing import Router

Watch = Callable[
    [Tensor, Tensor, Tensor], None
]  # experts [m], their weighted neurons [m, f/tp], a rank's outputs [m, h]


class SharedExpert(MegatronModule):
    """The linears of the expert that every token passes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        hidden, neurons = config.hidden_size, config.moe_shared_expert_intermediate_size
        more = {"config": config, "bias": False, "skip_bias_add": False}
        rows = neurons * (2 if config.gated_linear_unit else 1)
        stride = 2 if config.gated_linear_unit else 1
        self.linear_fc1 = ColumnParallelLinear(
            hidden, rows, gather_output=False, init_method=config.init_method, stride=stride, **more
        )
        self.linear_fc2 = RowParallelLinear(
            neurons, hidden, input_is_parallel=True, init_method=config.output_layer_init_method, **more
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As Megatron's MLP: gate and up apart."""
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_fc1.weight"
        if self.config.gated_linear_unit:
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


class Duplicated(MegatronModule):
    """A linear `[rows, columns]` that every tensor-parallel rank has whole."""

    def __init__(self, config: TransformerConfig, rows: int, columns: int, init: Any) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype))
        if config.perform_initialization:
            init(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel


class Mixture(MegatronModule):
    """The sub-layer `[s, b, h]` -> `[s, b, h]`; `pg_collection` as Megatron's layers hand it on."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config)
        self.tp_group = parallel_state.get_tensor_model_parallel_group() if pg_collection is None else pg_collection.tp
        self.ep_group = parallel_state.get_expert_model_parallel_group()
        hidden, latent = config.hidden_size, config.moe_latent_size
        count, neurons, gated = config.num_moe_experts, config.moe_ffn_hidden_size, config.gated_linear_unit
        width, more = latent or hidden, {"tp_group": self.tp_group, "ep_group": self.ep_group}
        self.router = Router(config)
        self.watch: Watch | None = None
        if latent:
            self.fc1_latent_proj = Duplicated(config, latent, hidden, config.init_method)
            self.fc2_latent_proj = Duplicated(config, hidden, latent, config.output_layer_init_method)
        self.experts = _Named(
            config,
            linear_fc1=GroupedLinear(
                config, (count, neurons * (2 if gated else 1), width), split=1, init=config.init_method, halves=gated,
                **more,
            ),
            linear_fc2=GroupedLinear(
                config, (count, width, neurons), split=2, init=config.output_layer_init_method, **more
            ),
        )  # fmt: skip
        self.shared_experts = SharedExpert(config) if config.moe_shared_expert_intermediate_size else None

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Output and no bias, as Megatron's layers expect."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat)
        tokens = flat if not self.config.moe_latent_size else flat @ self.fc1_latent_proj.weight.t()
        experts = range(self.config.num_moe_experts)
        out = self.mixed(tokens, weights, chosen, experts, None, None, {}, lambda y: y)
        if self.config.moe_latent_size:
            out = out @ self.fc2_latent_proj.weight.t()
        out = out.view_as(x)
        if self.shared_experts is not None:
            y, _ = self.shared_experts.linear_fc1(x)
            out = out + self.shared_experts.linear_fc2(self.activated(y))[0]
        return out, None

    def mixed(
        self, tokens: Tensor, weights: Tensor, chosen: Tensor, experts: Any, fc1: Any, fc2: Any, sizes: Any, inner: Any
    ) -> Tensor:
        """Weighted sum over the chosen experts, `[n, width]` -> `[n, width]` (a rank's part of the sequence).

        Args:
            weights, chosen: `[n, E kept]`.
            experts: which of all they are.
            fc1, fc2, sizes: rows of the table and what they are cut to; None and nothing: whole.
            inner: what is done to the neurons `[m, f]` behind the activation.
        """
        parallel = self.config.sequence_parallel
        if parallel:
            gather = {"tensor_parallel_output_grad": True, "group": self.tp_group}
            tokens = gather_from_sequence_parallel_region(tokens, **gather)
            weights = gather_from_sequence_parallel_region(weights, **gather)
            chosen = gather_from_sequence_parallel_region(chosen.int(), **gather).bool()
        else:
            tokens = copy_to_tensor_model_parallel_region(tokens, group=self.tp_group)
            weights = copy_to_tensor_model_parallel_region(weights, group=self.tp_group)
        of_expert, of_token = chosen.t().nonzero(as_tuple=True)
        x, share, counts, way = tokens[of_token], weights[of_token, of_expert].unsqueeze(-1), chosen.sum(0), None
        if self.ep_group.size() > 1:
            way = Dispatch(counts, self.ep_group)
            x, share, experts = way.there(x), way.there(share), self._held(experts)
        counts = counts.tolist() if way is None else way.counts
        first, second = self.experts.experts.linear_fc1.weight, self.experts.experts.linear_fc2.weight
        y = inner(self.activated(grouped(x, first, counts, experts, fc1, sizes)))
        y = neurons = y * share.to(y.dtype)
        y = grouped(y, second, counts, experts, fc2, sizes)
        if self.watch is not None:
            self._watched(counts, experts, neurons.detach(), y.detach(), way)
        y = y if way is None else way.back(y)
        out = torch.zeros_like(tokens).index_add(0, of_token, y)
        if parallel:
            return reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)

    def _held(self, experts: Sequence[int]) -> list[int]:
        """Which of this rank's tensor the experts are that it holds; `experts` are in the order of all."""
        rank, held = self.ep_group.rank(), self.experts.experts.linear_fc1.weight.shape[0]
        share = len(experts) // self.ep_group.size()
        return [expert - rank * held for expert in experts[rank * share : (rank + 1) * share]]

    def _watched(self, counts: Sequence[int], experts: Sequence[int], neurons: Tensor, y: Tensor, way: Any) -> None:
        """Show what the experts did to this rank's tokens."""
        first = self.ep_group.rank() * self.experts.experts.linear_fc1.weight.shape[0]
        named = (
            torch.tensor([first + expert for expert in experts]).repeat_interleave(torch.tensor(counts)).to(y.device)
        )
        self.watch(*(t if way is None else t[way.own] for t in (named, neurons, y)))

    def activated(self, y: Tensor) -> Tensor:
        """`[..., f]`, or gated `[gate; up]` `[..., 2f]`, -> `[..., f]`."""
        if not self.config.gated_linear_unit:
            return self.config.activation_func(y)
        gate, up = y.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up


class _Named(MegatronModule):
    """`experts.experts.linear_fc1`, `experts.experts.linear_fc2`: the names in Megatron's checkpoints."""

    def __init__(self, config: TransformerConfig, **linears: nn.Module) -> None:
        super().__init__(config)
        inner = MegatronModule(config)
        for name, linear in linears.items():
            inner.add_module(name, linear)
        self.experts = inner
