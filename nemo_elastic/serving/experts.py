"""The mixture of experts of a child: its first experts of every group, each by views of the parent's stacked tensors.

    y = sum over the top-k experts e of  w_e fc2_e(act(fc1_e(x)))  +  shared_fc2(act(shared_fc1(x)))

Only experts that some token goes to are run, one after the other. Which they are is known once the router has run, so
that a step with experts cannot be recorded as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear import Linear
from .parts import Parts, rms_norm

TINY = 1e-20  # beside the sum by which a sigmoid router divides, as Megatron and transformers have it


@dataclass(frozen=True)
class Mixture:
    """It remembers nothing. `gated`: `up` and `shared_up` give `[gate; up]`; `into`, `back`: to the latent channels."""

    norm: Tensor
    eps: float
    router: Tensor
    bias: Tensor | None
    top_k: int
    function: Mapping[str, Any]
    up: list[Linear]
    down: list[Linear]
    into: Linear | None
    back: Linear | None
    shared_up: Linear | None
    shared_down: Linear | None
    activation: Callable[[Tensor], Tensor]
    gated: bool
    waits = True  # for what the router says

    def cache(self, batch: int, room: int = 0, position: Tensor | None = None) -> None:
        """Nothing."""
        return None

    def __call__(self, x: Tensor, cache: None) -> Tensor:
        """`[b, s, k]` -> `[b, s, k]`."""
        y = rms_norm(x, self.norm, self.eps)
        flat = y.flatten(0, 1)
        weights, places = self._chosen(flat)
        tokens = flat if self.into is None else self.into(flat)
        out = torch.zeros_like(tokens)
        for expert in places.unique().tolist():
            rows, slots = (places == expert).nonzero(as_tuple=True)
            found = self.down[expert](self._activated(self.up[expert](tokens[rows])))
            out.index_add_(0, rows, found * weights[rows, slots].unsqueeze(-1).to(found.dtype))
        out = (out if self.back is None else self.back(out)).view_as(x)
        if self.shared_up is not None and self.shared_down is not None:
            out = out + self.shared_down(self._activated(self.shared_up(y)))
        return x + out

    def _chosen(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, k]` -> weights and numbers of the chosen experts, `[n, top_k]`, the weights in fp32 (fp64 for fp64)."""
        wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
        scores = flat.to(wide) @ self.router.to(wide).t()
        sigmoid = self.function["moe_router_score_function"] == "sigmoid"
        over_all = self.function["moe_router_pre_softmax"]
        if sigmoid:
            scores = torch.sigmoid(scores)
        elif over_all:
            scores = torch.softmax(scores, dim=-1)
        by = scores if self.bias is None else scores + self.bias.to(wide)
        places = by.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, places)
        if sigmoid and self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        elif not sigmoid and not over_all:
            weights = torch.softmax(weights, dim=-1)
        return weights * (self.function["moe_router_topk_scaling_factor"] or 1.0), places

    def _activated(self, y: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(y)
        gate, up = y.chunk(2, dim=-1)
        return self.activation(gate) * up


def layer(parts: Parts) -> Mixture:
    """A layer from its parameters."""
    arch = parts.architecture
    latent, shared = arch.moe_latent_size, arch.moe_shared_expert_intermediate_size
    return Mixture(
        norm=parts.vector("pre_mlp_layernorm.weight"),
        eps=parts.eps,
        router=parts.vector("mlp.router.weight"),
        bias=parts.vector("mlp.router.expert_bias") if arch.moe_router_enable_expert_bias else None,
        top_k=arch.moe_router_topk,
        function=parts.function,
        up=parts.each("mlp.experts.experts.linear_fc1.weight"),
        down=parts.each("mlp.experts.experts.linear_fc2.weight"),
        into=parts.matrix("mlp.fc1_latent_proj.weight") if latent else None,
        back=parts.matrix("mlp.fc2_latent_proj.weight") if latent else None,
        shared_up=parts.matrix("mlp.shared_experts.linear_fc1.weight") if shared else None,
        shared_down=parts.matrix("mlp.shared_experts.linear_fc2.weight") if shared else None,
        activation=parts.activation,
        gated=arch.gated_linear_unit,
    )
