"""Causal self attention with grouped query heads; query heads are cut, keys and values and channels never.

Positions (rotary) turn the channels of a head and have no parameters, so that no row knows of them.
"""

from __future__ import annotations

from typing import Any

from .axis import Axis, Groups, MakeFactor, Segment
from .kind import Dim, Gguf, HuggingFace, Kind, Packed, PerLayer, Ran, Size, Sizes, size_of


def _axes(arch: Any, groups: Groups, factor: MakeFactor) -> dict[str, Axis]:
    per_group = arch.num_attention_heads // arch.num_query_groups
    queries = factor("num_attention_heads", arch.num_query_groups, per_group, tp=True)
    queries_keys_values = factor("num_attention_heads", arch.num_query_groups, per_group, fixed=2, tp=True)
    channels = factor(None, 1, arch.kv_channels)
    return {
        "qkv": (Segment("qkv", (queries_keys_values, channels)),),
        "q": (Segment("q", (queries, channels)),),
        "head_channels": (Segment("head_channels", (channels,)),),
    }


def _flops(arch: Any, sizes: Sizes, length: int, chunk_size: int) -> Any:
    """Projections, and the whole score matrix, not its causal half, as kernels that skip no block compute it."""
    h, q = size_of(arch, sizes, "hidden_size"), size_of(arch, sizes, "num_attention_heads")
    d, kv = arch.kv_channels, arch.num_query_groups
    return 2 * length * h * ((q + 2 * kv) * d + q * d) + _scores(arch, sizes, length, chunk_size)


def _scores(arch: Any, sizes: Sizes, length: int, chunk_size: int) -> Any:
    """Queries times keys, and the shares times values."""
    return 2 * 2 * length * length * size_of(arch, sizes, "num_attention_heads") * arch.kv_channels


def _caches(arch: Any, sizes: Sizes, length: int) -> dict[str, Any]:
    return {"kv_cache": 2 * arch.num_query_groups * arch.kv_channels * length}


def _saved(arch: Any, sizes: Sizes, ran: Ran) -> dict[str, float]:
    """The packed product (keys and values are views of it), the queries once more where several share a key, and the
    result with a row's log-sum-exp in fp32; a kernel that keeps no scores, as torch's and the CUDA ones are. Norms of
    heads and positions each make queries and keys of their own.
    """
    heads, groups, e, wide = size_of(arch, sizes, "num_attention_heads"), arch.num_query_groups, ran.element, 4
    queries = e * heads * arch.kv_channels / ran.ranks
    keys = e * groups * arch.kv_channels / ran.ranks
    kept = {"qkv": queries + 2 * keys, "into proj": queries}
    if ran.context > 1 and not ran.selective:
        kept["gathered keys and values"] = 2 * keys * ran.context
    kept |= {} if ran.selective else {"log-sum-exp": wide * heads / ran.ranks}
    if arch.qk_layernorm:  # in fp32: what each normed and the normed one, with a factor a head
        taken = queries + keys if e != wide else queries if heads > groups else 0  # in fp32 already there, or copied
        kept["norms of heads"] = taken * wide / e + wide * (heads + groups) * (arch.kv_channels + 1) / ran.ranks
    if arch.qk_layernorm or ran.turned:
        kept["queries and keys"] = queries + keys
    elif heads > groups:
        kept["queries"] = queries
    kept |= {"cosines and sines": 4 * e * ran.turned / ran.sequences} if ran.turned else {}
    return kept | (
        {"in front of masks and gates": queries} if ran.soft or ran.gates or (ran.cut and not ran.selective) else {}
    )


def _exchanged(arch: Any, sizes: Sizes, context: int) -> float:
    """Keys and values of all other ranks."""
    return 2 * arch.num_query_groups * arch.kv_channels * (context - 1)


def _gguf_keys(arch: Any) -> dict[str, Any]:
    return {"attention.key_length": arch.kv_channels, "attention.value_length": arch.kv_channels}


ATTENTION = Kind(
    letter="*",
    name="attention",
    words="attention",
    heading="q heads",
    colours=("#d9730d", "#f5a04a"),
    sizes=(
        Size(name="num_attention_heads", huggingface=("num_attention_heads",)),
        Size(name="num_query_groups", huggingface=("num_key_value_heads",)),
        Size(name="kv_channels", required=False, huggingface=("head_dim", "attention_head_dim")),
    ),
    multiples_of=(("num_attention_heads", "num_query_groups"),),
    dims=(
        Dim(
            name="num_attention_heads",
            place=30,
            groups=lambda arch, groups: arch.num_query_groups,
            ratios=(1.0, 0.75, 0.5),
            words="attention heads",
            short="attn\nheads",
            schemas=("uniform", "per_layer_config"),
        ),
    ),
    split_by=("num_query_groups",),
    flags=("add_qkv_bias", "qk_layernorm", "add_bias_linear"),
    rows={
        "input_layernorm.weight": ("hidden",),
        "self_attention.linear_qkv.weight": ("qkv", "hidden"),
        "self_attention.linear_qkv.bias": ("qkv",),
        "self_attention.q_layernorm.weight": ("head_channels",),
        "self_attention.k_layernorm.weight": ("head_channels",),
        "self_attention.linear_proj.weight": ("hidden", "q"),
        "self_attention.linear_proj.bias": ("hidden",),
    },
    only_with={
        "self_attention.linear_qkv.bias": ("add_qkv_bias", "add_bias_linear"),
        "self_attention.q_layernorm.weight": ("qk_layernorm",),
        "self_attention.k_layernorm.weight": ("qk_layernorm",),
        "self_attention.linear_proj.bias": ("add_bias_linear",),
    },
    axes=_axes,
    norm=("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    extra_states=("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    flops=_flops,
    recomputed=_scores,
    caches=_caches,
    saved=_saved,
    exchanged=_exchanged,
    aligned={"qkv": "qkv rows", "q": "proj columns"},
    fewest="min_attention_layers",
    huggingface=HuggingFace(
        blocks=("full_attention", "attention"),
        names={
            "input_layernorm.weight": ("norm.weight",),
            "self_attention.linear_qkv.weight": ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
            "self_attention.linear_proj.weight": ("mixer.o_proj.weight",),
        },
        packed={"self_attention.linear_qkv.weight": Packed(groups="num_query_groups", channels="kv_channels")},
    ),
    gguf=Gguf(
        names={
            "norm.weight": "attn_norm.weight",
            "mixer.q_proj.weight": "attn_q.weight",
            "mixer.k_proj.weight": "attn_k.weight",
            "mixer.v_proj.weight": "attn_v.weight",
            "mixer.o_proj.weight": "attn_output.weight",
        },
        matrices=frozenset(["attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"]),
        per_layer=(
            # Never 0: llama.cpp divides by the first layer's, whatever its kind.
            PerLayer(key="attention.head_count", size="num_attention_heads", elsewhere=True, list_always=False),
            PerLayer(key="attention.head_count_kv", size="num_query_groups"),
        ),
        keys=_gguf_keys,
    ),
    serving="nemo_elastic.serving.attention",
    module="nemo_elastic.mcore.elastic.attention",
    slot="*",
)
