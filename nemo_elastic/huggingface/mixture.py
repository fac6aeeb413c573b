"""What families with experts share: fields that only a model with experts has, and what its router computes.

norm_topk_prob    sigmoid: the chosen scores are divided by their sum, as Megatron does wherever more than one is
                  chosen;  softmax: over the chosen ones, else over all (`moe_router_pre_softmax`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kinds import kind_of_dim
from ..problems import Problem
from .adapter import Field, Model, Only
from .said import Said

COUNT, NEURONS, SHARED = "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"
LATENT, TOPK, BIAS = "moe_latent_size", "moe_router_topk", "moe_router_enable_expert_bias"
SCORE, FIRST, SCALING = "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"
ROUTING = (SCORE, FIRST, SCALING, BIAS)
SOME = "a size of it, in every mixture"


def has_experts(model: Model) -> bool:
    """Whether there is a layer of them."""
    return kind_of_dim(COUNT).letter in (model.get("hybrid_override_pattern") or "")


NO_GROUPS = Only(
    keys=("n_group", "topk_group"),
    allowed=(1, None),
    why="experts would have to stay in their routing groups, which is not supported",
    unsaid=True,
    when=has_experts,
)


def sizes(
    count: tuple[str, ...], *, neurons: str, shared: str | None = None, unsaid: Mapping[str, int]
) -> tuple[Field, ...]:
    """Sizes of experts under a family's keys; `unsaid`: what its class takes where a file does not say them."""
    found = [(COUNT, count), (TOPK, ("num_experts_per_tok",)), (NEURONS, (neurons,))]
    found += [(SHARED, (shared,))] if shared else []
    return tuple(Field(ours=ours, keys=keys, default=unsaid[ours], when=has_experts) for ours, keys in found)


def router_problems(model: Model, family: str, wanted: Mapping[str, Any]) -> list[Problem]:
    """What of a model's experts a family cannot say, which has `wanted`; `SOME`: any size but 0."""
    if not has_experts(model):
        return []
    said = {name: None if name == SCALING and model[name] == 1.0 else model[name] for name in wanted}
    words = {name: only if only == SOME else repr(only) for name, only in wanted.items()}
    return [
        Problem(f"model.{name}", f"{said[name]!r} cannot be said in Hugging Face's {family}, which has {words[name]}")
        for name, only in wanted.items()
        if (not said[name] if only == SOME else said[name] != only)
    ]


def check_renormalised(said: Said, model: Model) -> None:
    """Note a `norm_topk_prob` of a sigmoid router that says otherwise than Megatron's divides."""
    several, value = model.get(TOPK) != 1, said.config.get("norm_topk_prob")
    if (True if value is None else value) is not several:
        words = (
            f"{value!r} must be {str(several).lower()}: Megatron's sigmoid router divides the weights of the chosen "
        )
        said.wrong("norm_topk_prob", f"{words}experts by their sum where there are several, and only there")


def read_scaling(said: Said) -> dict[str, Any]:
    """`routed_scaling_factor`; None where it is one: a model section need not say that."""
    value = said.config.get("routed_scaling_factor")
    value = said.number("routed_scaling_factor", 1.0 if value is None else value)
    return {SCALING: None if value == 1.0 else value}
