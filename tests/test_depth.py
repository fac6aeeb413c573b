"""Depth ranking: equal to brute force over real logits whatever is kept, at every layout, after every stop."""

import dataclasses
import itertools

import pytest
import torch
from pool_importance import (
    BATCH,
    LENGTH,
    TINY,
    ablation,
    build,
    load,
    logits_of,
    rank_depth,
    token_batches,
    whole_tensors,
)

from nemo_elastic.importance.depth import DepthRules, rank_by, rank_randomly
from nemo_elastic.importance.reuse import BASE, CANDIDATE, ActivationIndex, entry_of
from nemo_elastic.mcore.ranking.depth import DepthAblation
from nemo_elastic.problems import ProblemsError

ENTRY_FP64 = BATCH * LENGTH * TINY.hidden_size * 8
SIXTEEN = dataclasses.replace(TINY, hybrid_override_pattern="M-M-M*-M-M-M*-M-")


def brute_force(removed, batches, centred=True):
    """Normalized error of real logits without `removed`, by running the stock model with those layers taken out."""
    model = load(build(TINY, dtype=torch.float64), TINY, whole_tensors(TINY, torch.float64))
    stock, error, energy = model.decoder.layers, 0.0, 0.0

    def squares(logits):
        return (logits - logits.mean(-1, keepdim=True) if centred else logits).square().sum().item()

    with torch.no_grad():
        for tokens in batches:
            full = logits_of(model, tokens)
            model.decoder.layers = torch.nn.ModuleList(m for n, m in enumerate(stock) if n not in removed)
            error += squares(full - logits_of(model, tokens))
            energy += squares(full)
            model.decoder.layers = stock
    return error / energy


@pytest.fixture(scope="module")
def reference(one_rank):
    """Greedy by brute force, down to 4 layers: removal order and the scores of every round."""
    removed, history, batches = [], [], token_batches(TINY, 2)
    while len(removed) < 4:
        scores = {n: brute_force([*removed, n], batches) for n in range(8) if n not in removed}
        history.append(scores)
        removed.append(min(scores, key=scores.get))
    return removed, history


@pytest.mark.parametrize("entries", [0, 1, 3, 5, 11, 20, 10_000])
def test_greedy_is_brute_force_within_any_memory(reference, entries):
    ranker = ablation(dtype=torch.float64, batches=2, memory_bytes=entries * ENTRY_FP64, min_layers=4)
    progress = ranker.greedy()
    removed, history = reference
    assert progress.removed == removed
    last_known = {}
    for scores in history:
        last_known.update(scores)
    assert progress.scores == pytest.approx(last_known, rel=1e-9)
    assert len(ranker.index) <= entries
    assert ranker.layer_forwards <= ranker.naive_forwards == 2 * (8 + 8 * 7 + 7 * 6 + 6 * 5 + 5 * 4)


def test_the_papers_metric_counts_the_mean_of_the_logits_too(one_rank):
    scores = ablation(dtype=torch.float64, batches=2, metric="mse").one_shot().scores
    expected = {n: brute_force([n], token_batches(TINY, 2), centred=False) for n in range(8)}
    assert scores == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="did you mean 'centred_mse'"):
        ablation(metric="centered_mse")


def test_one_shot_is_the_first_round(reference):
    ranker = ablation(dtype=torch.float64, batches=2, min_layers=4)
    progress = ranker.one_shot()
    assert progress.scores == pytest.approx(reference[1][0], rel=1e-9)
    assert progress.removed == sorted(progress.scores, key=progress.scores.get)[:4]
    assert ranker.layer_forwards == 2 * (8 + 7 * 8 // 2)


@pytest.mark.parametrize(("method", "min_layers"), [("one_shot", 8), ("greedy", 8), ("greedy", 15)])
def test_reuse_at_sixteen_layers_runs_fewer_layers(one_rank, method, min_layers):
    ranker = ablation(SIXTEEN, batches=1, min_layers=min_layers)
    getattr(ranker, method)()
    assert ranker.naive_forwards / ranker.layer_forwards >= 1.8


def test_a_layer_that_adds_nothing_scores_zero(one_rank):
    tensors = whole_tensors(TINY)
    for name in ("4.mixer.out_proj", "3.self_attention.linear_proj", "5.mlp.linear_fc2"):
        tensors[f"decoder.layers.{name}.weight"].zero_()
    model = load(build(TINY), TINY, tensors)
    rules = DepthRules(pattern=TINY.hybrid_override_pattern, min_layers=5)
    ranker = DepthAblation(model, token_batches(TINY, 2), rules, memory_bytes=1e9)
    progress = ranker.greedy()
    assert progress.removed == [5, 4, 3]
    assert [progress.scores[n] for n in (3, 4, 5)] == [0.0, 0.0, 0.0]
    assert min(progress.scores[n] for n in (0, 1, 2, 6, 7)) > 1e-3
    assert progress.ranking(rules)[-3:] == (3, 4, 5)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_layer_that_was_scaled_down_goes_first(one_rank, layer):
    tensors = whole_tensors(TINY)
    last = {"M": "mixer.out_proj", "*": "self_attention.linear_proj", "-": "mlp.linear_fc2"}
    name = f"decoder.layers.{layer}.{last[TINY.hybrid_override_pattern[layer]]}.weight"
    tensors[name] *= 1e-3
    rules = DepthRules(pattern=TINY.hybrid_override_pattern, min_layers=6)
    ranker = DepthAblation(load(build(TINY), TINY, tensors), token_batches(TINY, 2), rules, memory_bytes=1e9)
    assert ranker.greedy().removed[0] == layer


def test_what_is_protected_stays(one_rank):
    progress = ablation(batches=1, min_layers=3, protected_layers=(5, 7), min_attention_layers=1).greedy()
    assert len(progress.removed) == 5
    assert not {3, 5, 7} & set(progress.removed)
    rules = DepthRules(pattern=TINY.hybrid_override_pattern, min_layers=3, protected_layers=(5, 7))
    assert set(progress.ranking(rules)[:2]) == {5, 7}
    assert sorted(progress.ranking(rules)) == list(range(8))


def test_impossible_rules_are_all_named():
    with pytest.raises(ProblemsError) as caught:
        DepthRules(pattern="M-M*", min_layers=5, protected_layers=(4,), min_attention_layers=2)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["rank.min_layers", "rank.min_attention_layers", "rank.protected_layers"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 3, 4, 9])
def test_a_stopped_ranking_goes_on_from_its_last_batch(one_rank, stop_after):
    """3 batches a round: stops inside and at the end of a round."""
    states = []

    def stop(ranker):
        states.append(ranker.state())
        if len(states) == stop_after:
            raise Stopped

    whole = ablation(batches=3, min_layers=4)
    whole.greedy()
    with pytest.raises(Stopped):
        ablation(batches=3, min_layers=4, on_batch=stop).greedy()
    seen = []
    resumed = ablation(batches=3, min_layers=4, on_batch=lambda ranker: seen.append(None))
    resumed.load_state(states[-1])
    progress = resumed.greedy()
    assert progress.removed == whole.progress.removed
    assert progress.scores == pytest.approx(whole.progress.scores, rel=1e-6)
    assert len(seen) == 3 * 4 - stop_after


@pytest.mark.parametrize(
    ("layout", "sp"), [({"tp": 2}, False), ({"tp": 2}, True), ({"pp": 2}, False), ({}, False)], ids=str
)
def test_two_processes_rank_like_one(pool2, single, layout, sp):
    assert_like(pool2.run(rank_depth, "greedy", sp, min_layers=4, **layout), single)


KEEPS_ALL, KEEPS_THREE = 1e9, 3 * BATCH * LENGTH * TINY.hidden_size * 4


@pytest.mark.parametrize(
    ("layout", "sp", "memory_bytes"),
    [
        ({"tp": 2, "pp": 2}, True, KEEPS_ALL),
        ({"tp": 2, "pp": 2}, False, KEEPS_THREE),
        ({"pp": 4}, False, KEEPS_ALL),
        ({"pp": 2}, False, KEEPS_THREE),
        ({"tp": 4}, False, KEEPS_ALL),
    ],
    ids=str,
)
def test_four_processes_rank_like_one(pool4, single, layout, sp, memory_bytes):
    assert_like(pool4.run(rank_depth, "greedy", sp, min_layers=4, memory_bytes=memory_bytes, **layout), single)


@pytest.fixture(scope="module")
def single(one_rank):
    return rank_depth("greedy", min_layers=4)


def assert_like(results, single):
    for removed, scores, _, cosine in results:
        assert removed == single[0]
        assert scores == pytest.approx(single[1], rel=1e-5)
        assert cosine == pytest.approx(single[3], rel=1e-5)


def test_cosine_is_that_of_the_layers_in_and_output(one_rank, single):
    model = load(build(TINY), TINY, whole_tensors(TINY))
    states = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda m, a, k: states.append(k["hidden_states"]), with_kwargs=True)
    model.decoder.final_norm.register_forward_pre_hook(lambda m, a: states.append(a[0]))
    cosines = []
    with torch.no_grad():
        for tokens in token_batches(TINY, 4):
            states.clear()
            logits_of(model, tokens)
            pairs = itertools.pairwise(states)
            cosines.append([((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean().item() for a, b in pairs])
    expected = {n: 1 - sum(row) / len(row) for n, row in enumerate(zip(*cosines, strict=True))}
    assert single[3] == pytest.approx(expected, rel=1e-4)


def test_random_depends_on_the_seed_alone():
    rules = DepthRules(pattern=TINY.hybrid_override_pattern, min_layers=2)
    assert rank_randomly(rules, 3).ranking(rules) == rank_randomly(rules, 3).ranking(rules)
    assert len({rank_randomly(rules, seed).ranking(rules) for seed in range(5)}) > 1
    assert rank_by({n: 1.0 for n in range(8)}, rules).removed == [7, 6, 5, 4, 3, 2]


def test_the_index_keeps_what_a_next_round_can_use():
    index = ActivationIndex(dict.fromkeys(range(6), 0), capacity=6)
    assert index.wants(entry_of(0, (), 3), BASE)
    assert index.wants(entry_of(0, (1,), 3), CANDIDATE)
    assert index.wants(entry_of(0, (4,), 5), CANDIDATE)
    index.next_round((4,))
    assert entry_of(0, (), 3) in index  # nothing below 3 was removed
    assert entry_of(0, (1, 4), 3) in index  # the same activation as without (1,)
    assert index.restart(0, (4,)) == 5
    index.next_round((4, 2))  # below 3 now: layer 2
    assert index.restart(0, (2, 4)) == 0
    assert entry_of(0, (), 3) in index.take_evicted()
