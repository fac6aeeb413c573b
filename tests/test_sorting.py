"""Sorted == parent: logits and gradients, for every dim; sorting is idempotent and can be undone."""

import pytest
import torch
from pool_importance import (
    FFN_GROUPS,
    TINY,
    build,
    layout_of,
    load,
    logits_of,
    sorting_errors,
    token_batches,
    whole_tensors,
)

from nemo_elastic.importance.ranking import (
    dealt_order,
    depth_ranking,
    group_order,
    is_identity,
    random_orders,
    width_orders,
)
from nemo_elastic.importance.sorting import (
    SortedReader,
    orders_from_tensors,
    orders_to_tensors,
    sort_tensor,
    sort_tensors,
)
from nemo_elastic.space.dims import present_dims
from nemo_elastic.space.layout import ParamLayout

LAYOUT = layout_of(TINY)
WIDTHS = present_dims(TINY)
EVERY_DIM = [(dim,) for dim in WIDTHS] + [WIDTHS]


def shuffled(dims, seed=3):
    return random_orders(LAYOUT, dims, torch.Generator().manual_seed(seed))


def loss_and_gradients(tensors, dtype):
    model = load(build(TINY, dtype=dtype), TINY, tensors)
    logits = logits_of(model, token_batches(TINY, 1)[0])
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=dtype).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dims", EVERY_DIM, ids="+".join)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_sorted_parent_is_the_parent(one_rank, dims, dtype, tolerance):
    tensors, orders = whole_tensors(TINY, dtype), shuffled(dims)
    in_order = dict(sort_tensors(tensors.items(), LAYOUT, orders))
    assert any(not torch.equal(in_order[name], tensors[name]) for name in tensors)
    logits, gradients = loss_and_gradients(tensors, dtype)
    sorted_logits, sorted_gradients = loss_and_gradients(in_order, dtype)
    torch.testing.assert_close(sorted_logits, logits, rtol=tolerance, atol=tolerance * logits.abs().max().item())
    for name, gradient in sorted_gradients.items():
        mapped_back = sort_tensor(name, gradient, LAYOUT, orders, inverse=True)
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(mapped_back, gradients[name], rtol=tolerance, atol=tolerance * max(scale, 1.0))


def test_inverse_restores_every_bit():
    tensors, orders = whole_tensors(TINY), shuffled(WIDTHS)
    there = sort_tensors(tensors.items(), LAYOUT, orders)
    back = dict(sort_tensors(there, LAYOUT, orders, inverse=True))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_orders_survive_a_manifest():
    orders = shuffled(WIDTHS)
    again = orders_from_tensors(orders_to_tensors(orders), LAYOUT)
    assert again.keys() == orders.keys()
    assert all(torch.equal(again[layer][dim], order) for layer in orders for dim, order in orders[layer].items())
    broken = orders_to_tensors(orders)
    broken["1.ffn_hidden_size"] = torch.zeros(TINY.ffn_hidden_size, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"1\.ffn_hidden_size is no permutation"):
        orders_from_tensors(broken, LAYOUT)


@pytest.mark.parametrize("levels", [3, 10_000], ids=["ties", "distinct"])
def test_sorting_a_sorted_parent_changes_nothing(levels):
    """Scores of a sorted parent are the scores in the new order; ranking them again gives the identity, ties or not."""
    generator = torch.Generator().manual_seed(1)
    widths = {
        dim: {
            layer: torch.randint(levels, (getattr(TINY, dim),), generator=generator).float()
            for layer in orders_layers(dim)
        }
        for dim in WIDTHS
    }
    orders = width_orders(widths, LAYOUT)
    assert not is_identity(orders)
    after = {
        dim: {layer: scores[orders[min(layer, 7)][dim]] for layer, scores in rows.items()}
        for dim, rows in widths.items()
    }
    assert is_identity(width_orders(after, LAYOUT))


def orders_layers(dim):
    return sorted(layer for layer, by_dim in shuffled(WIDTHS).items() if layer is not None and dim in by_dim)


def test_the_first_units_of_every_group_are_the_best():
    scores = torch.rand(64, generator=torch.Generator().manual_seed(2))
    inside = scores[group_order(scores, 4)].view(4, 16)
    assert torch.equal(inside, scores.view(4, 16).sort(dim=1, descending=True).values)
    dealt = scores[dealt_order(scores, FFN_GROUPS)].view(FFN_GROUPS, -1)
    for kept in range(1, 9):
        best = scores.topk(kept * FFN_GROUPS).values.sort().values
        assert torch.equal(dealt[:, :kept].flatten().sort().values, best)
    assert torch.equal(dealt[:, 0], scores.topk(FFN_GROUPS).values)  # rank r goes to group r mod G


def test_a_shard_is_refused():
    shard = ParamLayout(TINY, ffn_groups=FFN_GROUPS, tp_size=2)
    with pytest.raises(ValueError, match="gather tensor-parallel shards first"):
        sort_tensor("decoder.layers.1.mlp.linear_fc1.weight", torch.zeros(32, 48), shard, shuffled(WIDTHS))
    with pytest.raises(ValueError, match="has no row in ParamLayout"):
        sort_tensor("decoder.layers.1.mlp.router.weight", torch.zeros(3), LAYOUT, shuffled(WIDTHS))


def test_a_reader_is_sorted_when_it_is_read():
    tensors, orders = whole_tensors(TINY), shuffled(WIDTHS)

    class InMemory:
        def names(self):
            return tensors.keys()

        def read(self, name):
            return tensors[name]

    reader = SortedReader(InMemory(), LAYOUT, orders)
    name = "decoder.layers.0.mixer.in_proj.weight"
    assert torch.equal(reader.read(name), sort_tensor(name, tensors[name], LAYOUT, orders))
    assert reader.shape(name) == tuple(tensors[name].shape)


def test_depth_ranking_is_the_removal_reversed_behind_the_survivors():
    scores = {0: 5.0, 1: 1.0, 2: 2.0, 3: 2.0, 4: 0.1}
    assert depth_ranking([4, 1], scores) == (0, 2, 3, 1, 4)
    assert depth_ranking([4, 1], scores, protected=[3]) == (3, 0, 2, 1, 4)


def assert_no_errors(results):
    for errors in results:
        assert len(errors) == len(EVERY_DIM) + 1
        for case, (logits, gradients) in errors.items():
            double = "float64" in case
            assert logits < (1e-10 if double else 1e-5), (case, logits)
            assert gradients < (1e-10 if double else 1e-4), (case, gradients)


@pytest.mark.parametrize(("layout", "sp"), [({"tp": 2}, True), ({"pp": 2}, False)], ids=str)
def test_sorted_parent_is_the_parent_on_two_processes(pool2, layout, sp):
    assert_no_errors(pool2.run(sorting_errors, sp, **layout))


@pytest.mark.parametrize(
    ("layout", "sp"), [({"tp": 4}, False), ({"pp": 4}, False), ({"tp": 2, "pp": 2}, True)], ids=str
)
def test_sorted_parent_is_the_parent_on_four_processes(pool4, layout, sp):
    assert_no_errors(pool4.run(sorting_errors, sp, **layout))
