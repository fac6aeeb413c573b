"""The feed-forward layer: neurons between two products, with a gate or without one; neurons are cut.

fc2(act(fc1(x)))        gated: fc2(act(gate(x)) * up(x)), where fc1's rows are [gate; up]
"""

from __future__ import annotations

from typing import Any

from .axis import Axis, Groups, MakeFactor, Segment
from .kind import Dim, Gguf, HuggingFace, Kind, PerLayer, Ran, Size, Sizes, size_of

SITES = {
    "linear_fc2_input": "the activation that enters linear_fc2 (Minitron)",
    "linear_fc1_output": "the first linear's output, before the activation function (the paper's formula)",
}


def _axes(arch: Any, groups: Groups, factor: MakeFactor) -> dict[str, Axis]:
    neurons = factor("ffn_hidden_size", groups.ffn, arch.ffn_hidden_size // groups.ffn, tp=True)
    rows = ("gate", "up") if arch.gated_linear_unit else ("ffn",)
    return {"ffn": (Segment("ffn", (neurons,)),), "fc1": tuple(Segment(name, (neurons,)) for name in rows)}


def _flops(arch: Any, sizes: Sizes, length: int, chunk_size: int) -> Any:
    products = 3 if arch.gated_linear_unit else 2
    return 2 * length * products * size_of(arch, sizes, "hidden_size") * size_of(arch, sizes, "ffn_hidden_size")


def _saved(arch: Any, sizes: Sizes, ran: Ran) -> dict[str, float]:
    """Nothing when it is computed again; else what the activation is taken of and what enters fc2; gated: gate and up,
    the activated gate, and their product.
    """
    if ran.selective:
        return {}
    neurons = ran.element * size_of(arch, sizes, "ffn_hidden_size") / ran.ranks
    kept = {"activation": neurons, "into fc2": neurons}
    kept |= {"up": neurons, "activated gate": neurons} if arch.gated_linear_unit else {}
    return kept | ({"in front of gates": neurons} if ran.soft or ran.gates else {})


MLP = Kind(
    letter="-",
    name="mlp",
    words="MLP",
    heading="ffn",
    colours=("#7c63c9", "#ab97f0"),
    sizes=(Size(name="ffn_hidden_size", huggingface=("intermediate_size",)),),
    dims=(
        Dim(
            name="ffn_hidden_size",
            place=10,
            groups=lambda arch, groups: groups.ffn,
            dealt="ffn_groups",
            multiple=lambda large, ranks: 64 if large else 8,
            ratios=(1.0, 0.75, 0.5),
            words="FFN size",
            short="ffn",
            schemas=("uniform", "list", "per_layer_config"),
        ),
    ),
    flags=("gated_linear_unit", "add_bias_linear"),
    rows={
        "pre_mlp_layernorm.weight": ("hidden",),
        "mlp.linear_fc1.weight": ("fc1", "hidden"),
        "mlp.linear_fc1.bias": ("fc1",),
        "mlp.linear_fc2.weight": ("hidden", "ffn"),
        "mlp.linear_fc2.bias": ("hidden",),
    },
    only_with={"mlp.linear_fc1.bias": ("add_bias_linear",), "mlp.linear_fc2.bias": ("add_bias_linear",)},
    axes=_axes,
    norm=("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    extra_states=("mlp.linear_fc1", "mlp.linear_fc2"),
    flops=_flops,
    recomputed=_flops,
    saved=_saved,
    aligned={"ffn": "neurons"},
    fp8={"ffn": "ffn_hidden_size {width}"},
    ranking={"ffn_site": SITES},
    ends_block=True,
    huggingface=HuggingFace(
        blocks=("mlp",),
        names={
            "pre_mlp_layernorm.weight": ("norm.weight",),
            "mlp.linear_fc1.weight": ("mixer.up_proj.weight",),
            "mlp.linear_fc2.weight": ("mixer.down_proj.weight",),
        },
    ),
    gguf=Gguf(
        names={
            "norm.weight": "attn_norm.weight",
            "mixer.up_proj.weight": "ffn_up.weight",
            "mixer.down_proj.weight": "ffn_down.weight",
        },
        matrices=frozenset(["ffn_up.weight", "ffn_down.weight"]),
        per_layer=(PerLayer(key="feed_forward_length", size="ffn_hidden_size"),),
    ),
    serving="nemo_elastic.serving.mlp",
    module="nemo_elastic.mcore.elastic.mlp",
    slot="-",
)
