"""Depth by blocks: a mixer and its MLP are ranked, dropped and chosen as one, at every layout."""

import dataclasses

import pytest
import torch
from pool_importance import TINY, ablation, build, load, logits_of, rank_depth, token_batches, whole_tensors
from small_parent import architecture

from nemo_elastic.config import load_config
from nemo_elastic.family import family_of
from nemo_elastic.importance.depth import DepthRules, rank_randomly
from nemo_elastic.problems import ProblemsError
from nemo_elastic.shapes.damage import _increments
from nemo_elastic.space.blocks import is_blocks
from nemo_elastic.space.elastic_space import ElasticSpace, even_thinning

# Six blocks: at four pipeline stages of three layers each, every other block lies on two of them.
BLOCKS = dataclasses.replace(TINY, hybrid_override_pattern="M-*-M-M-*-M-")
OPTIONS = {"arch": BLOCKS, "unit": 2, "min_layers": 6}


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [("*-", True), ("M-*-M-", True), ("M-M*M-*-", False), ("-M-*", False), ("*-*", False), ("", False), ("M", False)],
)
def test_which_patterns_are_blocks(pattern, whole):
    assert is_blocks(pattern) == whole


def without(removed, batches):
    """Error of real logits without these layers, by running the stock model with them taken out."""
    model = load(build(BLOCKS, dtype=torch.float64), BLOCKS, whole_tensors(BLOCKS, torch.float64))
    stock, error, energy = model.decoder.layers, 0.0, 0.0

    def squares(logits):
        return (logits - logits.mean(-1, keepdim=True)).square().sum().item()

    with torch.no_grad():
        for tokens in batches:
            full = logits_of(model, tokens)
            model.decoder.layers = torch.nn.ModuleList(m for n, m in enumerate(stock) if n not in removed)
            error += squares(full - logits_of(model, tokens))
            energy += squares(full)
            model.decoder.layers = stock
    return error / energy


@pytest.mark.parametrize("memory_bytes", [0.0, 3 * 2 * 16 * TINY.hidden_size * 8, 1e9])
def test_greedy_is_brute_force_over_blocks(one_rank, memory_bytes):
    batches, removed, last = token_batches(BLOCKS, 2), [], {}
    while len(removed) < 6:
        scores = {n: without([*removed, n, n + 1], batches) for n in range(0, 12, 2) if n not in removed}
        last |= scores
        worst = min(scores, key=scores.get)
        removed += [worst + 1, worst]
    ranker = ablation(dtype=torch.float64, batches=2, memory_bytes=memory_bytes, **OPTIONS)
    progress = ranker.greedy()
    assert progress.removed == removed
    assert {n: progress.scores[n] for n in last} == pytest.approx(last, rel=1e-9)
    assert all(progress.scores[n + 1] == progress.scores[n] for n in last)
    assert ranker.layer_forwards <= ranker.naive_forwards == 2 * (12 + 6 * 10 + 5 * 8 + 4 * 6)


@pytest.mark.parametrize("layout", [{"pp": 4}, {"tp": 2, "pp": 2}], ids=str)
def test_four_processes_rank_blocks_like_one(pool4, one_rank, layout):
    single = rank_depth("greedy", **OPTIONS)
    assert set(single[3]) == set(range(0, 12, 2))
    for removed, scores, _, cosine in pool4.run(rank_depth, "greedy", layout.get("tp") == 2, **OPTIONS, **layout):
        assert removed == single[0]
        assert scores == pytest.approx(single[1], rel=1e-5)
        assert cosine == pytest.approx(single[3], rel=1e-5)


def test_cosine_is_that_of_what_enters_and_leaves_a_block(one_rank):
    from nemo_elastic.mcore.ranking.cosine import cosine_scores

    model = load(build(BLOCKS), BLOCKS, whole_tensors(BLOCKS))
    states, (tokens,) = [], token_batches(BLOCKS, 1)
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda m, a, k: states.append(k["hidden_states"]), with_kwargs=True)
    model.decoder.final_norm.register_forward_pre_hook(lambda m, a: states.append(a[0]))
    with torch.no_grad():
        logits_of(model, tokens)
    ends = states[::2]
    expected = {
        2 * n: 1 - torch.cosine_similarity(ends[n], ends[n + 1], dim=-1).mean().item() for n in range(len(ends) - 1)
    }
    states.clear()
    assert cosine_scores(model, [tokens], unit=2) == pytest.approx(expected, rel=1e-4)


def test_what_may_go():
    rules = DepthRules(pattern="M-*-M-*-", unit=2, min_layers=3, protected_layers=(1,), min_attention_layers=1)
    assert rules.removable(()) == [2, 4, 6]
    assert rules.removable((2, 3)) == [4]  # the last attention layer stays, and block 0 is protected
    assert rules.removable((2, 3, 4, 5)) == []  # 4 layers are left, and 3 are wanted: a block more would be too much
    for seed in range(5):
        free = DepthRules(pattern="M-*-M-*-", unit=2, min_layers=2)
        ranking = rank_randomly(free, seed).ranking(free)
        ElasticSpace(architecture=architecture("M-*-M-*-"), ffn_groups=4, depth_ranking=ranking, depth_unit=2)


def test_children_have_whole_blocks():
    arch = architecture("M-*-M-*-")
    space = ElasticSpace(architecture=arch, ffn_groups=4, depth_unit=2)
    assert even_thinning(arch, 2) == (0, 1, 6, 7, 4, 5, 2, 3)
    assert space.subnet(num_layers=6).layers == (0, 1, 4, 5, 6, 7)
    with pytest.raises(ProblemsError, match=r"num_layers: 5 must be a multiple of 2, whole blocks; nearest: 4, 6"):
        space.subnet(num_layers=5)
    with pytest.raises(ProblemsError, match=r"layers: \[0, 3\] must be whole blocks"):
        space.subnet(layers=[0, 3])
    with pytest.raises(ProblemsError, match=r"layers: \[0, 1, 2\] must be whole blocks"):
        space.subnet(layers=[0, 1, 2])
    with pytest.raises(ProblemsError, match="block needs a pattern of a mixer and a feed-forward layer in turn"):
        ElasticSpace(architecture=architecture("M-M*M-*-"), ffn_groups=4, depth_unit=2)
    with pytest.raises(ProblemsError, match="one after the other; rank again"):
        ElasticSpace(architecture=arch, ffn_groups=4, depth_unit=2, depth_ranking=(0, 2, 1, 3, 4, 5, 6, 7))


def test_a_configuration_asks_for_blocks():
    words = ["parent.path=null", "model.hybrid_override_pattern=M-M-*-M-M-*-", "elastic.depth_unit=block"]
    family = family_of(load_config("tiny_parent.yaml", [*words, "elastic.dims.num_layers.choices=[12,0.7]"]).config)
    assert family.space.depth_unit == 2 and family.space.dims["num_layers"].choices == (12, 8)
    with pytest.raises(ProblemsError, match=r"num_layers.choices: 7 must be a multiple of 2"):
        family_of(load_config("tiny_parent.yaml", [*words, "elastic.dims.num_layers.choices=[12,7]"]).config)
    with pytest.raises(ProblemsError, match=r"elastic\.depth_unit: 'blocks' must be one of null, layer, block"):
        load_config("tiny_parent.yaml", ["elastic.depth_unit=blocks"])
    with pytest.raises(ProblemsError, match=r"elastic\.depth_unit: block needs a pattern"):
        family_of(load_config("tiny_parent.yaml", ["elastic.depth_unit=block"]).config)


def test_gated_neurons_are_not_ranked_where_they_are_two():
    words = ["parent.path=null", "model.gated_linear_unit=true", "model.activation_func=silu"]
    load_config("tiny_parent.yaml", words)
    with pytest.raises(ProblemsError, match=r"rank\.ffn_site: linear_fc1_output has a gate and a neuron"):
        load_config("tiny_parent.yaml", [*words, "rank.ffn_site=linear_fc1_output"])


def test_the_damage_of_a_block_is_shared_by_its_layers():
    losses = {0: 9.0, 1: 9.0, 2: 1.0, 3: 1.0, 4: 3.0, 5: 3.0}
    made = {"config": {"depth": "greedy", "depth_unit": 2}, "removed": [3, 2, 5, 4]}
    assert _increments(losses, made) == {2: 0.5, 3: 0.5, 4: 1.0, 5: 1.0, 0: 3.0, 1: 3.0}
    once = {"config": {"depth": "one_shot", "depth_unit": 2}}
    assert _increments(losses, once) == {0: 4.5, 1: 4.5, 2: 0.5, 3: 0.5, 4: 1.5, 5: 1.5}
