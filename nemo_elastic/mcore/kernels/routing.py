"""Which experts a token goes to, and with which weights, as Megatron's router and Hugging Face's models have it.

    softmax:  top-k of the logits, softmax over them (with `moe_router_pre_softmax`: top-k of the softmax over all)
    sigmoid:  top-k of sigmoid(logits) + bias, weights sigmoid(logits) / their sum
    times `moe_router_topk_scaling_factor`

A test holds it against Megatron's own. Logits are fp32 (fp64 for fp64), whatever the parameters are. The bias decides
the choice and never the weight, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ...space.layout import Axis

FP32 = ("expert_bias", "local_tokens_per_expert")


class Router(MegatronModule):
    """`weight` `[E, h]`; with a bias, `expert_bias` `[E]`, always fp32 and without a gradient.

    Megatron moves the bias after a step by `local_tokens_per_expert`, which training a plain model counts. An elastic
    model (`elastic`) counts none there: what each budget's tokens ask of the bias is another thing
    (`family.expert_load`).

    Attributes:
        tally: `[E]` integers that a forward's tokens are added to, while somebody counts.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        experts, self.elastic = config.num_moe_experts, False
        self.tally: Tensor | None = None
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel
        has_bias = config.moe_router_enable_expert_bias
        if has_bias:
            self.expert_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)
            self.register_buffer("local_tokens_per_expert", torch.zeros(experts), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """A cast of the model to bf16 leaves bias and counts in fp32: near ties decide by its last bits."""
        kept = {n: getattr(self, n).detach().clone() for n in FP32 if hasattr(self, n)}
        super()._apply(fn, recurse)
        for name, values in kept.items():
            now = getattr(self, name)
            if now.dtype != values.dtype:
                now.data = values.to(now.device)
        return self

    @property
    def bias(self) -> Tensor | None:
        """`expert_bias`, where there is one."""
        return getattr(self, "expert_bias", None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, h]` -> weights `[n, E]`, 0 where a token does not go, and where it goes `[n, E]`."""
        weights, places = chosen(self.config, logits(x, self.weight), self.bias)
        self.count(places)
        return weights, places

    def count(self, places: Tensor, experts: Tensor | None = None) -> None:
        """Count the tokens of `[n, kept]`, of which `experts` `[kept]` (None: of all)."""
        if self.tally is not None:
            counts = places.sum(0)
            if experts is None:
                self.tally += counts
            else:
                self.tally.index_add_(0, experts, counts)
        elif not self.elastic and self.bias is not None and self.training and torch.is_grad_enabled():
            self.local_tokens_per_expert += places.sum(0)


def kept_experts(axis: Axis, sizes: Mapping[str, int]) -> list[int]:
    """Which experts a layer keeps: the first of every group of its axis of experts."""
    ((factor,),) = (segment.factors for segment in axis)
    kept = factor.kept(sizes)
    return [group * factor.count + n for group in range(factor.groups) for n in range(kept)]


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """`[n, h]`, `[E, h]` -> `[n, E]` in fp32 (fp64 for fp64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide) @ weight.to(wide).t()


def chosen(config: Any, scores: Tensor, bias: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and choice, both `[n, E]`, of logits `[n, E]`.

    Args:
        mask: `[E]` in [0, 1], soft: an expert's share of its score. At 0 and 1 it is that of those with 1 alone.
    """
    sigmoid = config.moe_router_score_function == "sigmoid"
    barrier = None if mask is None else torch.log(mask.clamp_min(torch.finfo(scores.dtype).tiny))
    if sigmoid:
        scores = torch.sigmoid(scores)
        if mask is not None:
            scores = scores * mask
        by = scores if bias is None else scores + bias.to(scores.dtype)
        by = by if barrier is None else by + barrier
    else:
        scores = scores if barrier is None else scores + barrier
        by = scores = torch.softmax(scores, dim=-1) if config.moe_router_pre_softmax else scores
    places = by.detach().topk(config.moe_router_topk, dim=1).indices
    weights = scores.gather(1, places)
    if sigmoid and config.moe_router_topk > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif not sigmoid and not config.moe_router_pre_softmax:
        weights = torch.softmax(weights, dim=-1)
    if config.moe_router_topk_scaling_factor:
        weights = weights * config.moe_router_topk_scaling_factor
    nothing = torch.zeros_like(scores)
    return nothing.scatter(1, places, weights), nothing.bool().scatter(1, places, True)
