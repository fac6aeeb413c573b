"""A layer kind that is not in the package: `y = U D norm(x)`, a linear layer of a rank that children have less of.

The facts; `toy_linear_layer.py` computes it. Megatron has no letter for it: it is built in the MLP's slot, and its size
is a field of `TransformerConfig` that nothing else of these models reads.
"""

from nemo_elastic.kinds import Dim, Kind, Size
from nemo_elastic.kinds.axis import Segment
from nemo_elastic.kinds.kind import size_of

RANK, GROUPS = "cuda_graph_warmup_steps", 4


def _flops(arch, sizes, length, chunk_size):
    return 2 * length * 2 * size_of(arch, sizes, "hidden_size") * size_of(arch, sizes, RANK)


def _saved(arch, sizes, ran):
    return {"into up": ran.element * size_of(arch, sizes, RANK) / ran.ranks}


LINEAR = Kind(
    letter="L",
    name="linear",
    words="low-rank linear",
    heading="rank",
    colours=("#0a6b2f", "#4fd27f"),
    sizes=(Size(name=RANK),),
    dims=(
        Dim(
            name=RANK,
            groups=lambda arch, ffn_groups: GROUPS,
            ratios=(1.0, 0.5),
            words="linear rank",
            short="rank",
        ),
    ),
    rows={
        "pre_mlp_layernorm.weight": ("hidden",),
        "mlp.down.weight": ("rank", "hidden"),
        "mlp.up.weight": ("hidden", "rank"),
    },
    axes=lambda arch, ffn_groups, factor: {
        "rank": (Segment("rank", (factor(RANK, GROUPS, getattr(arch, RANK) // GROUPS, tp=True),)),)
    },
    norm=("pre_mlp_layernorm.weight", "mlp.down.layer_norm_weight"),
    flops=_flops,
    saved=_saved,
    aligned={"rank": "ranks"},
    module="toy_linear_layer",
    slot="-",
)
