"""Experts are ranked by REAP and neurons in every expert, alike in every layout; a sorted parent is the parent."""

import pool_experts
import pytest
import torch
from expert_features import FEATURES, parts
from pool_elastic import layout_of, random_weights, tokens
from small_parent import FFN_GROUPS, space_of
from test_elastic_modes import difference
from worker_pool import WorkerPool

from nemo_elastic.importance.ranking import is_identity, random_orders, width_orders
from nemo_elastic.importance.sorting import orders_from_tensors, orders_to_tensors, sort_tensors
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.kernels.routing import chosen, logits
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.mcore.ranking.collect import WidthCollector, WidthSettings, collect_widths
from nemo_elastic.mcore.ranking.stack_forward import Groups
from nemo_elastic.space.dims import present_dims

FP64 = torch.float64
COUNT, NEURONS, SHARED = "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("feature", list(FEATURES))
def test_a_sorted_parent_is_the_parent(feature: str) -> None:
    arch, function = parts(feature)
    layout, ids, weights = layout_of(arch), tokens(arch), random_weights(arch, FP64)
    found = {}
    for dim in ("", *present_dims(arch), "all"):
        dims = present_dims(arch) if dim == "all" else [dim] if dim else []
        orders = random_orders(layout, dims, torch.Generator().manual_seed(3))
        in_order = dict(sort_tensors(weights.items(), layout, orders))
        assert bool(dims) == any(not torch.equal(in_order[name], weights[name]) for name in weights)
        back = dict(sort_tensors(in_order.items(), layout, orders, inverse=True))
        assert all(torch.equal(back[name], weights[name]) for name in weights)
        again = orders_from_tensors(orders_to_tensors(orders), layout)
        assert all(torch.equal(again[layer][d], order) for layer in orders for d, order in orders[layer].items())
        model = build_plain_model({**vars(arch), **function}, params_dtype=FP64)
        load_weights(model, in_order, arch, ffn_groups=FFN_GROUPS)
        found[dim] = model(ids, None, None)
    for dim, logits_of in found.items():
        assert difference(logits_of, found[""]) < 1e-10, dim


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("feature", ["nemotron", "granite", "latent"])
def test_scores_are_those_of_the_formula(feature: str) -> None:
    """REAP: mean over the tokens of an expert of weight x norm of its output; neurons: sum of weight x |activation|."""
    arch, _ = parts(feature)
    model, seen = pool_experts.plain(feature), {}
    for layer in model.decoder.layers:
        if hasattr(layer, "mlp") and hasattr(layer.mlp, "router"):
            layer.mlp.register_forward_pre_hook(
                lambda module, args, n=layer.layer_number - 1: seen.setdefault(n, []).append((module, args[0]))
            )
    batches = [tokens(arch, seed) for seed in range(pool_experts.SAMPLES)]
    found = collect_widths(model, batches, layout_of(arch))
    assert sorted(seen) == list(arch.layers_of("E")) == sorted(found[COUNT])
    assert (SHARED in found) == bool(arch.moe_shared_expert_intermediate_size)
    for number, inputs in seen.items():
        added, count, inside = torch.zeros(8, dtype=FP64), torch.zeros(8, dtype=FP64), torch.zeros(8, 16, dtype=FP64)
        for mixture, x in inputs:
            flat = x.flatten(0, 1)
            weights, places = chosen(mixture.config, logits(flat, mixture.router.weight), mixture.router.bias)
            inner = flat @ mixture.fc1_latent_proj.weight.t() if arch.moe_latent_size else flat
            first, second = mixture.experts.experts.linear_fc1.weight, mixture.experts.experts.linear_fc2.weight
            for expert in range(8):
                mine = places[:, expert]
                neurons = mixture.activated(inner[mine] @ first[expert].t())
                out = neurons @ second[expert].t()
                out = out @ mixture.fc2_latent_proj.weight.t() if arch.moe_latent_size else out
                added[expert] += (weights[mine, expert] * out.norm(dim=-1)).sum()
                count[expert] += mine.sum()
                inside[expert] += (weights[mine, expert][:, None] * neurons.abs()).sum(0)
        assert difference(found[COUNT][number].double(), added / count.clamp_min(1)) < 1e-6
        assert difference(found[NEURONS][number].double(), inside) < 1e-6
    model.eval()
    assert all(layer.mlp.watch is None for layer in model.decoder.layers if hasattr(getattr(layer, "mlp", 0), "watch"))


LAYOUTS = {
    "tp2_sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "dp2": {}, "tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True},
    "tp2_dp2": {"tp": 2}, "ep2": {"ep": 2}, "ep2_dp2": {"ep": 2}, "ep2_tp2_sp": {"ep": 2, "tp": 2, "sp": True},
    "ep2_pp2": {"ep": 2, "pp": 2},
}  # fmt: skip
SIZES = {name: 2 if name in ("tp2_sp", "pp2", "dp2", "ep2") else 4 for name in LAYOUTS}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_layout_changes_nothing(request: pytest.FixtureRequest, one_rank: None, name: str) -> None:
    pool: WorkerPool = request.getfixturevalue(f"pool{SIZES[name]}")
    alone, in_order = pool_experts.scores("nemotron"), pool_experts.sorted_weights("nemotron")
    layout = layout_of(parts("nemotron")[0])
    orders = width_orders(alone, layout)
    for rank in pool.run(pool_experts.scores, "nemotron", **LAYOUTS[name]):
        assert rank.keys() == alone.keys()
        found = width_orders(rank, layout)
        assert all(torch.equal(found[n][dim], order) for n in orders for dim, order in orders[n].items())
        for dim, rows in alone.items():
            assert all(difference(rank[dim][layer], row) < 1e-5 for layer, row in rows.items()), dim
    for rank in pool.run(pool_experts.sorted_weights, "nemotron", **LAYOUTS[name]):
        assert rank and all(torch.equal(weight, in_order[n]) for n, weight in rank.items())


@pytest.mark.usefixtures("one_rank")
def test_the_best_experts_and_their_best_neurons_are_kept() -> None:
    """Dealt over the groups: a child keeps the k best of all, and of each of these the best neurons."""
    arch, function = parts("nemotron")
    layout, found = layout_of(arch), pool_experts.scores("nemotron")
    orders = width_orders(found, layout)
    again = {dim: {n: rows[n].gather(-1, orders[n][dim]) if rows[n].ndim == 1 else
                   rows[n].gather(1, orders[n][dim])[orders[n][COUNT]] for n in rows}
             for dim, rows in found.items() if dim in (COUNT, NEURONS)}  # fmt: skip
    assert is_identity(width_orders(again, layout))
    for layer in arch.layers_of("E"):
        kept = found[COUNT][layer][orders[layer][COUNT].view(FFN_GROUPS, -1)[:, 0]]
        assert torch.equal(kept.sort(descending=True).values, found[COUNT][layer].topk(FFN_GROUPS).values)
    subnet = space_of(arch).subnet(num_moe_experts=4, moe_ffn_hidden_size=8)
    model = build_elastic_model({**vars(arch), **function}, ffn_groups=FFN_GROUPS, params_dtype=FP64)
    in_order = dict(sort_tensors(random_weights(arch, FP64).items(), layout, orders))
    load_weights(model, in_order, arch, ffn_groups=FFN_GROUPS)
    assert model(tokens(arch), None, None, elastic=hard_plan(layout, subnet)).isfinite().all()


@pytest.mark.usefixtures("one_rank")
def test_a_ranking_that_had_seen_every_sample_goes_on_with_the_same_sums() -> None:
    """Interrupted behind the widths: nothing is observed any more, and plain sums are still plain sums."""
    arch, _ = parts("nemotron")
    layout, settings, groups = layout_of(arch), WidthSettings(), Groups.from_megatron()
    batches = [tokens(arch, seed) for seed in range(pool_experts.SAMPLES)]
    model = pool_experts.plain("nemotron").eval()
    with WidthCollector(model, layout, settings, groups) as collector:
        for batch in batches:
            collector.observe(batch)
        state, wanted = {n: t.clone() for n, t in collector.state().items()}, collector.widths()
    with WidthCollector(model, layout, settings, groups) as resumed:
        resumed.load_state(state)
        found = resumed.widths()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[dim][n], row) for dim, rows in wanted.items() for n, row in rows.items())
