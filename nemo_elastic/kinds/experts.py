"""The mixture of experts: every token passes the few experts that a router picks for it, and a shared one.

    y = sum over the top-k experts e of  w_e fc2_e(act(fc1_e(x)))  +  shared_fc2(act(shared_fc1(x)))

The experts' matrices are one tensor each, `[E, f, h]`: an expert is a unit of its first axis, and the neurons of every
expert are units of another one. Checkpoints of Megatron have the same tensor; others store it expert by expert. Gated,
fc1's rows are [gate; up]. With a latent size the experts' input and output have that many channels, and two products
lead there and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .axis import Axis, Groups, MakeFactor, Segment
from .kind import Dim, HuggingFace, Kind, Ran, Size, Sizes, size_of

COUNT, NEURONS, SHARED = "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"
LATENT, TOPK, BIAS = "moe_latent_size", "moe_router_topk", "moe_router_enable_expert_bias"


def _axes(arch: Any, groups: Groups, factor: MakeFactor) -> dict[str, Axis]:
    neurons = factor(NEURONS, groups.ffn, getattr(arch, NEURONS) // groups.ffn, tp=True)
    shared = factor(SHARED, groups.ffn, getattr(arch, SHARED) // groups.ffn, tp=True)
    experts = COUNT, groups.experts, getattr(arch, COUNT) // groups.experts
    rows = ("gate", "up") if arch.gated_linear_unit else ("ffn",)
    latent, hidden = getattr(arch, LATENT), factor("hidden_size", 1, arch.hidden_size)
    return {
        "expert": (Segment("expert", (factor(*experts),)),),  # of the router, which every rank has whole
        "held_expert": (Segment("expert", (factor(*experts, ep=True),)),),
        "expert_ffn": (Segment("ffn", (neurons,)),),
        "expert_fc1": tuple(Segment(name, (neurons,)) for name in rows),
        "expert_hidden": (Segment("latent", (factor(None, 1, latent),)),)
        if latent
        else (Segment("hidden", (hidden,)),),
        "latent": (Segment("latent", (factor(None, 1, max(1, latent)),)),),
        "shared_ffn": (Segment("ffn", (shared,)),),
        "shared_fc1": tuple(Segment(name, (shared,)) for name in rows),
    }


def _products(arch: Any) -> int:
    return 3 if arch.gated_linear_unit else 2


def _flops(arch: Any, sizes: Sizes, length: int, chunk_size: int) -> Any:
    hidden, latent = size_of(arch, sizes, "hidden_size"), getattr(arch, LATENT)
    width = latent or hidden
    experts = _products(arch) * getattr(arch, TOPK) * width * size_of(arch, sizes, NEURONS)
    shared = _products(arch) * hidden * size_of(arch, sizes, SHARED)
    return 2 * length * (hidden * size_of(arch, sizes, COUNT) + experts + shared + 2 * hidden * latent)


def _saved(arch: Any, sizes: Sizes, ran: Ran) -> dict[str, float]:
    """Of every expert that a token goes to what enters it, what the activation is taken of, what enters fc2, and its
    output; as much of the shared expert; the router's scores. Nothing when it is computed again. Counted, not measured.
    """
    if ran.selective:
        return {}
    hidden, latent, e = size_of(arch, sizes, "hidden_size"), getattr(arch, LATENT), ran.element
    rows = _products(arch) - 1 + int(arch.gated_linear_unit) + int(ran.soft or ran.gates)
    routed = getattr(arch, TOPK) * size_of(arch, sizes, NEURONS) / ran.ranks
    shared = size_of(arch, sizes, SHARED) / ran.ranks
    return {
        "tokens of experts": 2 * e * getattr(arch, TOPK) * (latent or hidden) + e * latent,
        "activation": e * rows * (routed + shared),
        "into fc2": e * (2 * routed + shared),
        "scores": 4 * 3 * size_of(arch, sizes, COUNT),
    }


def _dispatched(arch: Any, sizes: Sizes) -> float:
    return 2 * getattr(arch, TOPK) * (getattr(arch, LATENT) or size_of(arch, sizes, "hidden_size"))


def _met(arch: Any, sizes: Sizes) -> dict[str, tuple[int, Any]]:
    share = getattr(arch, TOPK), size_of(arch, sizes, COUNT)
    return {"mlp.experts.experts.linear_fc1.weight": share, "mlp.experts.experts.linear_fc2.weight": share}


def _broken(arch: Any) -> Iterator[tuple[str, str]]:
    if getattr(arch, TOPK) > getattr(arch, COUNT):
        yield TOPK, f"{getattr(arch, TOPK)} must be at most {COUNT}={getattr(arch, COUNT)}"
    if arch.add_bias_linear:
        yield "add_bias_linear", "True, and a pattern with experts: biases of experts are not supported; remove it"


def _dim(name: str, place: int, words: str, short: str, *, least: Any = lambda arch: 1, **more: Any) -> Dim:
    experts = name == COUNT
    return Dim(
        name=name,
        place=place,
        groups=lambda arch, groups: groups.experts if experts else groups.ffn,
        dealt="expert_groups" if experts else "ffn_groups",
        least=least,
        words=words,
        short=short,
        **more,
    )


EXPERTS = Kind(
    letter="E",
    name="experts",
    words="mixture of experts",
    heading="experts",
    colours=("#a8324a", "#e8889a"),
    sizes=(
        Size(name=COUNT, default=1, none_if_absent=True, huggingface=("n_routed_experts", "num_local_experts")),
        Size(name=NEURONS, default=1, none_if_absent=True, huggingface=("moe_intermediate_size",)),
        Size(name=TOPK, default=1, none_if_absent=True, huggingface=("num_experts_per_tok",)),
        Size(name=SHARED, required=False, default=0, none_if_absent=True, huggingface=(SHARED,)),
        Size(name=LATENT, required=False, default=0, none_if_absent=True, huggingface=(LATENT,)),
    ),
    dims=(
        _dim(COUNT, 50, "experts", "experts", least=lambda arch: getattr(arch, TOPK), ratios=(1.0, 0.75, 0.5)),
        _dim(
            NEURONS,
            51,
            "FFN size of an expert",
            "expert\nffn",
            within=COUNT,
            multiple=lambda large, ranks: 64 if large else 8,
            ratios=(1.0, 0.75, 0.5),
            schemas=("uniform",),
        ),
        _dim(
            SHARED,
            52,
            "FFN size of the shared expert",
            "shared\nffn",
            multiple=lambda large, ranks: 64 if large else 8,
            ratios=(1.0, 0.75, 0.5),
            schemas=("uniform",),
        ),
    ),
    flags=("gated_linear_unit", BIAS),
    rows={
        "pre_mlp_layernorm.weight": ("hidden",),
        "mlp.router.weight": ("expert", "hidden"),
        "mlp.router.expert_bias": ("expert",),
        "mlp.fc1_latent_proj.weight": ("latent", "hidden"),
        "mlp.experts.experts.linear_fc1.weight": ("held_expert", "expert_fc1", "expert_hidden"),
        "mlp.experts.experts.linear_fc2.weight": ("held_expert", "expert_hidden", "expert_ffn"),
        "mlp.fc2_latent_proj.weight": ("hidden", "latent"),
        "mlp.shared_experts.linear_fc1.weight": ("shared_fc1", "hidden"),
        "mlp.shared_experts.linear_fc2.weight": ("hidden", "shared_ffn"),
    },
    only_with={
        "mlp.router.expert_bias": (BIAS,),
        "mlp.fc1_latent_proj.weight": (LATENT,),
        "mlp.fc2_latent_proj.weight": (LATENT,),
        "mlp.shared_experts.linear_fc1.weight": (SHARED,),
        "mlp.shared_experts.linear_fc2.weight": (SHARED,),
    },
    uncast=("mlp.router.expert_bias",),  # near ties are decided by its last bits
    axes=_axes,
    norm=("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight"),
    flops=_flops,
    recomputed=_flops,
    saved=_saved,
    met=_met,
    dispatched=_dispatched,
    broken=_broken,
    aligned={"expert_ffn": "neurons of an expert", "shared_ffn": "neurons of the shared expert"},
    fp8={"expert_ffn": "moe_ffn_hidden_size {width}"},
    ends_block=True,
    huggingface=HuggingFace(
        blocks=("moe",),
        names={
            "pre_mlp_layernorm.weight": ("norm.weight",),
            "mlp.router.weight": ("mixer.gate.weight",),
            "mlp.router.expert_bias": ("mixer.gate.e_score_correction_bias",),
            "mlp.fc1_latent_proj.weight": ("mixer.fc1_latent_proj.weight",),
            "mlp.experts.experts.linear_fc1.weight": ("mixer.experts.#.up_proj.weight",),
            "mlp.experts.experts.linear_fc2.weight": ("mixer.experts.#.down_proj.weight",),
            "mlp.fc2_latent_proj.weight": ("mixer.fc2_latent_proj.weight",),
            "mlp.shared_experts.linear_fc1.weight": ("mixer.shared_experts.up_proj.weight",),
            "mlp.shared_experts.linear_fc2.weight": ("mixer.shared_experts.down_proj.weight",),
        },
    ),
    serving="nemo_elastic.serving.experts",
    module="nemo_elastic.mcore.elastic.experts",
    slot="E",
)
