"""Cutting tensors, against index sets that are written out unit by unit for every kind of axis."""

import itertools

import pytest
import torch
from small_parent import FFN_GROUPS, SMALL, architecture
from torch import Tensor

from nemo_elastic.space.layout import ParamLayout, ParamSpec
from nemo_elastic.space.slicing import accumulate, is_whole, permute, scatter, shard, take, unit_mask, unshard

A = SMALL
GROUPS = {"mamba": A["mamba_num_groups"], "attention": A["num_query_groups"], "ffn": FFN_GROUPS}
CUTS = [
    {},
    {"hidden_size": 20},
    {"ffn_hidden_size": 24},
    {"mamba_num_heads": 8},
    {"mamba_head_dim": 5},
    {"num_attention_heads": 8},
    {
        "hidden_size": 1,
        "ffn_hidden_size": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 1,
        "num_attention_heads": 4,
    },
    {"hidden_size": 36, "ffn_hidden_size": 52, "mamba_num_heads": 8, "mamba_head_dim": 3, "num_attention_heads": 8},
]
TABLE = ParamLayout(architecture("M*-"), ffn_groups=FFN_GROUPS).table


def kept_rows(axis: str, sizes: dict[str, int]) -> list[int]:
    """Kept positions of an axis of the parent, counted row by row as Megatron lays them out."""
    size = {**A, **sizes}
    heads, p, n, d = A["mamba_num_heads"], A["mamba_head_dim"], A["mamba_state_dim"], A["kv_channels"]
    per_group, kept_per_group = heads // GROUPS["mamba"], size["mamba_num_heads"] // GROUPS["mamba"]
    head_ok = [h for h in range(heads) if h % per_group < kept_per_group]
    inner = [h * p + c for h in head_ok for c in range(size["mamba_head_dim"])]
    state = list(range(GROUPS["mamba"] * n))
    if axis == "hidden":
        return list(range(size["hidden_size"]))
    if axis == "ffn":
        block = A["ffn_hidden_size"] // GROUPS["ffn"]
        return [i for i in range(A["ffn_hidden_size"]) if i % block < size["ffn_hidden_size"] // GROUPS["ffn"]]
    if axis in ("q", "qkv"):
        r, keep = (
            A["num_attention_heads"] // A["num_query_groups"],
            size["num_attention_heads"] // A["num_query_groups"],
        )
        in_group = r + 2 if axis == "qkv" else r
        ok = [j for j in range(in_group) if j < keep or j >= r]
        return [(g * in_group + j) * d + c for g in range(A["num_query_groups"]) for j in ok for c in range(d)]
    if axis == "x":
        return inner
    if axis == "heads":
        return head_ok
    parts = {"z": (inner, heads * p), "x": (inner, heads * p), "B": (state, len(state)), "C": (state, len(state))}
    parts["dt"] = (head_ok, heads)
    found, start = [], 0
    for name in axis.split("+"):
        kept, length = parts[name]
        found += [start + i for i in kept]
        start += length
    return found


AXES = {
    "embedding.word_embeddings.weight": (None, "hidden"),
    "output_layer.weight": (None, "hidden"),
    "decoder.final_norm.weight": ("hidden",),
    "norm.weight": ("hidden",),
    "mixer.in_proj.weight": ("z+x+B+C+dt", "hidden"),
    "mixer.conv1d.weight": ("x+B+C", None, None),
    "mixer.conv1d.bias": ("x+B+C",),
    "mixer.dt_bias": ("heads",),
    "mixer.A_log": ("heads",),
    "mixer.D": ("heads",),
    "mixer.norm.weight": ("x",),
    "mixer.out_proj.weight": ("hidden", "x"),
    "input_layernorm.weight": ("hidden",),
    "self_attention.linear_qkv.weight": ("qkv", "hidden"),
    "self_attention.linear_proj.weight": ("hidden", "q"),
    "pre_mlp_layernorm.weight": ("hidden",),
    "mlp.linear_fc1.weight": ("ffn", "hidden"),
    "mlp.linear_fc2.weight": ("hidden", "ffn"),
}


def index_sets(spec: ParamSpec, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    axes = AXES[spec.name.split(".", 3)[-1] if spec.layer is not None else spec.name]
    shape = spec.shape({})
    return tuple(
        torch.arange(n) if axis is None else torch.tensor(kept_rows(axis, sizes))
        for axis, n in zip(axes, shape, strict=True)
    )


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("spec", TABLE.values(), ids=list(TABLE))
def test_take_accumulate_and_scatter(spec: ParamSpec, sizes: dict[str, int]) -> None:
    whole = torch.randn(spec.shape({}))
    grid = torch.meshgrid(*index_sets(spec, sizes), indexing="ij")
    expected = whole[grid]
    child = take(whole, spec, sizes)
    assert torch.equal(child, expected)
    assert is_whole(spec, sizes) == (child.shape == whole.shape)

    more = torch.randn_like(expected)
    added = whole.clone()
    added[grid] += more
    assert torch.equal(accumulate(more, spec, sizes, whole.clone()), added)
    written = whole.clone()
    written[grid] = more
    assert torch.equal(scatter(more, spec, sizes, whole.clone()), written)

    kept = torch.zeros_like(whole)
    kept[grid] = 1
    assert torch.equal(scatter(child, spec, sizes, torch.zeros_like(whole)), whole * kept)


@pytest.mark.parametrize("name", list(TABLE))
def test_larger_sizes_keep_what_smaller_ones_keep(name: str) -> None:
    spec = TABLE[name]
    for small, large in itertools.combinations(
        ({"hidden_size": 8 * k, "ffn_hidden_size": 16 * k, "mamba_num_heads": 4 * k, "mamba_head_dim": 2 * k,
          "num_attention_heads": 4 * k} for k in (1, 2, 3)), 2
    ):  # fmt: skip
        marks = [scatter(torch.ones(spec.shape(s)), spec, s, torch.zeros(spec.shape({}))) for s in (small, large)]
        assert torch.all(marks[0] <= marks[1])


@pytest.mark.parametrize(
    ("axis", "ours", "dims"),
    [
        ("hidden", "hidden", ["hidden_size"]),
        ("ffn", "ffn", ["ffn_hidden_size"]),
        ("x", "x", ["mamba_num_heads", "mamba_head_dim"]),
        ("x+B+C", "x+B+C", ["mamba_num_heads", "mamba_head_dim"]),
        ("q", "q", ["num_attention_heads"]),
        ("qkv", "qkv", ["num_attention_heads"]),
    ],
)
def test_unit_masks_mark_the_kept_rows(axis: str, ours: str, dims: list[str]) -> None:
    layout = ParamLayout(architecture("M*-"), ffn_groups=FFN_GROUPS)
    sizes = {d: CUTS[-1][d] for d in dims}
    masks = {}
    for segment in layout.axes[ours]:
        for factor in segment.factors:
            if factor.dim:
                masks[factor.dim] = (torch.arange(factor.count) < factor.kept(sizes)).float()
    mask = unit_mask(layout.axes[ours], masks)
    assert mask.nonzero().flatten().tolist() == kept_rows(axis, sizes)


def orders_inside_groups(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def order(groups: int, size: int) -> Tensor:
        units = torch.stack([torch.randperm(size // groups, generator=generator) for _ in range(groups)])
        return (units + torch.arange(groups)[:, None] * (size // groups)).flatten()

    return {
        "hidden_size": order(1, A["hidden_size"]),
        "ffn_hidden_size": order(1, A["ffn_hidden_size"]),
        "mamba_num_heads": order(GROUPS["mamba"], A["mamba_num_heads"]),
        "mamba_head_dim": order(1, A["mamba_head_dim"]),
        "num_attention_heads": order(GROUPS["attention"], A["num_attention_heads"]),
    }


@pytest.mark.parametrize("name", list(TABLE))
def test_permuting_and_back_is_the_identity(name: str) -> None:
    spec, orders = TABLE[name], orders_inside_groups(3)
    whole = torch.randn(spec.shape({}))
    moved = permute(whole, spec, orders)
    assert torch.equal(permute(moved, spec, orders, inverse=True), whole)
    assert spec.dims == set() or not torch.equal(moved, whole)


def test_permutation_moves_whole_units() -> None:
    """qkv rows of query head h go where h goes, K and V stay; in_proj rows of z, x and dt move alike."""
    orders = orders_inside_groups(4)
    d, r = A["kv_channels"], A["num_attention_heads"] // A["num_query_groups"]
    spec = TABLE["decoder.layers.1.self_attention.linear_qkv.weight"]
    whole = torch.arange(spec.shape({})[0]).float()[:, None].expand(-1, A["hidden_size"]).contiguous()
    rows = permute(whole, spec, {"num_attention_heads": orders["num_attention_heads"]})[:, 0].long().view(-1, r + 2, d)
    for new, old in enumerate(orders["num_attention_heads"].tolist()):
        start = ((old // r) * (r + 2) + old % r) * d
        assert rows[new // r, new % r].tolist() == list(range(start, start + d))
    for g in range(A["num_query_groups"]):
        start = (g * (r + 2) + r) * d
        assert rows[g, r:].flatten().tolist() == list(range(start, start + 2 * d))

    spec = TABLE["decoder.layers.0.mixer.in_proj.weight"]
    heads, p, state = A["mamba_num_heads"], A["mamba_head_dim"], GROUPS["mamba"] * A["mamba_state_dim"]
    whole = torch.arange(spec.shape({})[0]).float()[:, None].expand(-1, A["hidden_size"]).contiguous()
    mamba = {k: orders[k] for k in ("mamba_num_heads", "mamba_head_dim")}
    z, x, b, c, dt = permute(whole, spec, mamba)[:, 0].long().split([heads * p, heads * p, state, state, heads])
    expected = torch.tensor([h * p + ch for h in mamba["mamba_num_heads"] for ch in mamba["mamba_head_dim"]])
    assert torch.equal(z, expected) and torch.equal(x, expected + heads * p)
    assert torch.equal(torch.cat([b, c]), torch.arange(2 * state) + 2 * heads * p)
    assert torch.equal(dt, mamba["mamba_num_heads"] + 2 * heads * p + 2 * state)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", list(TABLE))
def test_shards(name: str, tp: int) -> None:
    """unshard(shard) is the identity, and cutting a shard is sharding the cut (METHOD trap 1)."""
    spec = TABLE[name]
    part = ParamLayout(architecture("M*-"), ffn_groups=FFN_GROUPS, tp_size=tp).table[name]
    whole = torch.randn(spec.shape({}))
    shards = [shard(whole, part, rank) for rank in range(tp)]
    assert all(tuple(s.shape) == part.shape({}) for s in shards)
    assert torch.equal(unshard(shards, part), whole)
    for sizes in CUTS:
        child = take(whole, spec, sizes)
        child_arch = architecture("M*-", **sizes)
        child_part = ParamLayout(child_arch, ffn_groups=FFN_GROUPS, tp_size=tp).table[name]
        for rank in range(tp):
            assert torch.equal(take(shards[rank], part, sizes), shard(child, child_part, rank))


@pytest.mark.parametrize(("vocab_size", "tp"), [(61, 2), (61, 4), (5, 4)])
def test_padding_is_zeros_at_the_end_and_is_cut_again(vocab_size: int, tp: int) -> None:
    layout = ParamLayout(architecture("M*-", vocab_size=vocab_size), ffn_groups=FFN_GROUPS, tp_size=tp)
    part, whole = layout.table["output_layer.weight"], torch.randn(vocab_size, A["hidden_size"])
    shards = [shard(whole, part, rank) for rank in range(tp)]
    assert all(tuple(s.shape) == part.shape({}) for s in shards)
    assert torch.equal(torch.cat(shards)[:vocab_size], whole)
    assert not torch.cat(shards)[vocab_size:].any()
    assert torch.equal(unshard(shards, part), whole)


def test_shards_are_megatrons_own() -> None:
    """A rank has its part of EACH of z, x, B, C and dt, not a contiguous block of the rows."""
    name = "decoder.layers.0.mixer.in_proj.weight"
    part = ParamLayout(architecture("M*-"), ffn_groups=FFN_GROUPS, tp_size=2).table[name]
    whole = torch.arange(TABLE[name].shape({})[0]).float()[:, None].expand(-1, A["hidden_size"]).contiguous()
    inner, state, heads = A["mamba_num_heads"] * A["mamba_head_dim"], GROUPS["mamba"] * A["mamba_state_dim"], 12
    pieces = whole[:, 0].split([inner, inner, state, state, heads])
    for rank in range(2):
        expected = torch.cat([piece.chunk(2)[rank] for piece in pieces])
        assert torch.equal(shard(whole, part, rank)[:, 0], expected)


def test_prefix_cuts_are_views_and_others_are_compact() -> None:
    fc2, fc1 = TABLE["decoder.layers.2.mlp.linear_fc2.weight"], TABLE["decoder.layers.2.mlp.linear_fc1.weight"]
    for spec, sizes, view in ((fc2, {"hidden_size": 20}, True), (fc1, {"ffn_hidden_size": 24}, False)):
        whole = torch.randn(spec.shape({}))
        assert (take(whole, spec, sizes).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == view
