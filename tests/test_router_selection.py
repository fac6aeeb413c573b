"""Masks, gates and subnets from probabilities, against the slicing table."""

import pytest
import torch
from router_spaces import RANKING, draw, make_layout, make_space, random_probabilities

from nemo_elastic.router.selection import (
    argmax_selection,
    expected_sizes,
    kept_layer_probabilities,
    one_hot,
    soft_masks,
    straight_through_gates,
    straight_through_masks,
)
from nemo_elastic.space.choices import full_selection, selection_of, subnet_of
from nemo_elastic.space.dims import KIND_OF_DIM
from nemo_elastic.space.layout import ParamSpec
from nemo_elastic.space.slicing import take, unit_mask


@pytest.mark.parametrize("per_layer", [False, True])
def test_one_hot_soft_masks_keep_what_slicing_keeps(per_layer):
    space = make_space(per_layer=per_layer)
    like = random_probabilities(space, 0)
    g = torch.Generator().manual_seed(1)
    for tp_size in (1, 2, 4):
        layout = make_layout(tp_size)
        for _ in range(2):
            selection = draw(like, g)
            masks = soft_masks(space, one_hot(selection, like))
            subnet = subnet_of(space, selection)
            assert masks.layers.nonzero()[:, 0].tolist() == list(subnet.layers)
            for layer in range(space.architecture.num_layers):
                kind = space.architecture.hybrid_override_pattern[layer]
                row = space.architecture.layers_of(kind).index(layer)
                own = {n: m[row if KIND_OF_DIM.get(n) == kind and len(m) > 1 else 0] for n, m in masks.dims.items()}
                sizes = layout.sizes(subnet, layer)
                for spec in (s for s in layout.table.values() if s.layer == layer):
                    for axis in spec.axes:
                        positions = torch.arange(sum(segment.length({}) for segment in axis))
                        kept = take(positions, ParamSpec("", layer, kind, (axis,)), sizes)
                        expected = positions.double().zero_().index_fill(0, kept, 1)
                        assert torch.equal(unit_mask(axis, own), expected), spec.name


def test_soft_masks_are_the_mean_of_sampled_masks():
    space = make_space(per_layer=True)
    pi = random_probabilities(space, 2)
    g, n = torch.Generator().manual_seed(3), 600
    soft = soft_masks(space, pi)
    total = {name: torch.zeros_like(m) for name, m in soft.dims.items()}
    layers = torch.zeros_like(soft.layers)
    for _ in range(n):
        hard = soft_masks(space, one_hot(draw(pi, g), pi))
        layers += hard.layers
        for name in total:
            total[name] += hard.dims[name]
    bound = 4.5 * 0.5 / n**0.5
    assert (layers / n - soft.layers).abs().max() < bound
    assert max((total[name] / n - m).abs().max() for name, m in soft.dims.items()) < bound


def test_gates_are_exactly_one_and_carry_the_chosen_probabilitys_gradient():
    space = make_space(per_layer=True)
    pi = {n: p.float().requires_grad_() for n, p in random_probabilities(space, 4).items()}
    selection = draw(pi, torch.Generator().manual_seed(5))
    gates = straight_through_gates(space, pi, selection)
    kept = subnet_of(space, selection).layers
    for gate in gates.dims.values():
        assert (gate == 1).all()
    assert torch.equal(gates.layers.detach(), torch.tensor([float(i in kept) for i in range(12)]))
    weights = torch.arange(1.0, 6.0)[: len(gates.dims["ffn_hidden_size"])]
    (gates.dims["ffn_hidden_size"] * weights).sum().backward(retain_graph=True)
    expected = torch.zeros_like(pi["ffn_hidden_size"])
    for row, i in enumerate(selection["ffn_hidden_size"]):
        expected[row, i] = weights[row]
    assert torch.equal(pi["ffn_hidden_size"].grad, expected)
    gates.layers[RANKING[-1]].backward()  # the least important layer lives only at full depth
    assert torch.equal(pi["num_layers"].grad, torch.tensor([[1.0, 0.0, 0.0]]))


def test_straight_through_masks_are_hard_with_a_soft_gradient():
    space = make_space()
    logits = {n: torch.log(p).requires_grad_() for n, p in random_probabilities(space, 6).items()}
    pi = {n: torch.softmax(z, -1) for n, z in logits.items()}
    selection = argmax_selection(pi)
    mixed, soft = straight_through_masks(space, pi, selection), soft_masks(space, pi)
    hard = soft_masks(space, one_hot(selection, pi))
    w = torch.randn(32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert torch.equal(mixed.dims["ffn_hidden_size"].detach(), hard.dims["ffn_hidden_size"])
    grads = [
        torch.autograd.grad(m.dims["ffn_hidden_size"][0] @ w, logits["ffn_hidden_size"], retain_graph=True)[0]
        for m in (mixed, soft)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)
    assert grads[0].abs().max() > 0


def test_expected_sizes_and_kept_layers():
    space = make_space()
    pi = {"hidden_size": torch.tensor([[0.1, 0.2, 0.3, 0.4]]), "num_layers": torch.tensor([[0.5, 0.3, 0.2]])}
    assert expected_sizes(space, pi)["hidden_size"].item() == pytest.approx(9.6 + 16 + 19.2 + 19.2, rel=1e-6)
    kept = kept_layer_probabilities(space, pi)
    expected = torch.ones(12)
    expected[list(RANKING[8:10])] = 0.8
    expected[list(RANKING[10:])] = 0.5
    torch.testing.assert_close(kept, expected)


def test_a_selection_and_its_subnet_are_the_same_thing():
    for per_layer in (False, True):
        space = make_space(per_layer=per_layer)
        g = torch.Generator().manual_seed(8)
        for _ in range(10):
            selection = draw(random_probabilities(space, 9, 0.0), g)
            assert selection_of(space, subnet_of(space, selection)) == selection
        assert subnet_of(space, full_selection(space)) == space.full_subnet()
    space = make_space()
    assert selection_of(space, space.subnet(hidden_size=95)) is None
    assert selection_of(space, space.subnet(layers=(0, 1, 2, 3, 4, 5, 6, 7))) is None
