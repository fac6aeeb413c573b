"""The whole of `rank` on a model: samples dealt alike for every DP, planted structure found, stops cost one batch."""

import pytest
import torch
from pool_importance import LENGTH, TINY, build, layout_of, load, logits_of, own_batches, token_batches, whole_tensors

from nemo_elastic.config.sections import RankConfig
from nemo_elastic.importance.run_state import RunState, forget_states
from nemo_elastic.importance.sorting import sort_tensors
from nemo_elastic.importance.store import Importance
from nemo_elastic.mcore.ranking.rank import rank_parent
from nemo_elastic.mcore.ranking.sort_live import sort_model
from nemo_elastic.problems import ProblemsError

CONFIG = RankConfig(samples=8, depth_samples=4, micro_batch_size=2, seq_length=LENGTH)


def sample(index):
    return torch.randint(0, TINY.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(index))


def rank(tensors=None, config=CONFIG, sp=False, **options):
    model = load(build(TINY, sp=sp), TINY, tensors or whole_tensors(TINY))
    return rank_parent(model, layout_of(TINY), config, sample, min_layers=5, **options)


def scores_of(sp=False):
    importance = rank(sp=sp)
    return importance.widths, importance.depth_ranking, importance.depth_scores


@pytest.fixture(scope="module")
def importance(one_rank):
    return rank()


def test_everything_is_ranked_and_can_be_saved(importance, tmp_path):
    importance.save(tmp_path, TINY)
    again = Importance.load(tmp_path, TINY)
    assert again.depth_ranking == importance.depth_ranking
    assert again.provenance["parallel"] == {"tp": 1, "pp": 1, "dp": 1}
    assert again.provenance["naive_layer_forwards"] > again.provenance["layer_forwards"]


@pytest.mark.parametrize(("layout", "sp"), [({}, False), ({"tp": 2}, True), ({"tp": 2, "pp": 2}, True)], ids=str)
def test_four_processes_rank_the_same_samples(pool4, importance, layout, sp):
    for widths, ranking, depth in pool4.run(scores_of, sp, **layout):
        assert ranking == importance.depth_ranking
        assert depth == pytest.approx(importance.depth_scores, rel=1e-5)
        for dim, rows in importance.widths.items():
            for layer, scores in rows.items():
                torch.testing.assert_close(widths[dim][layer], scores, rtol=1e-5, atol=0)


def test_planted_units_are_ranked_last(one_rank):
    """Units whose weights were scaled down on purpose end at the back of their group, in every dim."""
    tensors, weak = whole_tensors(TINY), 1e-3
    inner, p, d = TINY.mamba_num_heads * TINY.mamba_head_dim, TINY.mamba_head_dim, TINY.kv_channels
    for name in tensors:
        if "norm.weight" in name and "mixer" not in name:
            tensors[name][[5, 17]] *= weak  # hidden channels
    tensors["decoder.layers.1.mlp.linear_fc1.weight"][[3, 40]] *= weak  # neurons
    per_group = (TINY.num_attention_heads // TINY.num_query_groups + 2) * d
    value = slice(2 * per_group + 3 * d, 2 * per_group + 4 * d)  # V of group 2: both its heads
    tensors["decoder.layers.3.self_attention.linear_qkv.weight"][value] *= weak
    mixer = "decoder.layers.4.mixer"
    tensors[f"{mixer}.norm.weight"].view(-1, p)[6] *= weak  # head 6: the second of group 3
    tensors[f"{mixer}.norm.weight"].view(-1, p)[:, 2] *= weak  # channel 2 of every head
    assert tensors[f"{mixer}.norm.weight"].numel() == inner
    ranked = rank(tensors)
    orders = ranked.orders(layout_of(TINY))
    assert set(orders[None]["hidden_size"][-2:].tolist()) == {5, 17}
    neurons = ranked.widths["ffn_hidden_size"][1]
    assert set(neurons.argsort()[:2].tolist()) == {3, 40}
    heads = ranked.widths["num_attention_heads"][3]
    assert set(heads.argsort()[:2].tolist()) == {4, 5}
    assert orders[4]["mamba_num_heads"].tolist()[7] == 6
    assert orders[4]["mamba_head_dim"][-1] == 2


def test_a_sorted_parent_has_sorted_scores(importance):
    layout = layout_of(TINY)
    orders = importance.orders(layout)
    again = rank(dict(sort_tensors(whole_tensors(TINY).items(), layout, orders)))
    for dim, rows in importance.widths.items():
        for layer, scores in rows.items():
            order = orders[None if dim == "hidden_size" else layer][dim]
            torch.testing.assert_close(again.widths[dim][layer], scores[order], rtol=2e-5, atol=1e-7)
    assert again.depth_ranking == importance.depth_ranking


class Stopped(Exception):
    pass


def runs_of_first_layer(**options):
    """(forwards of layer 0 during a whole `rank`, its result)."""
    calls, model = [], load(build(TINY), TINY, whole_tensors(TINY))
    model.decoder.layers[0].register_forward_hook(lambda *a: calls.append(None))
    ranked = rank_parent(model, layout_of(TINY), CONFIG, sample, min_layers=5, **options)
    return len(calls), ranked


@pytest.mark.parametrize("stop_at", [("widths", 3), ("depth", 9)], ids=str)
def test_resume_repeats_at_most_one_batch(one_rank, importance, tmp_path, stop_at):
    def stop(phase, done, total):
        if (phase, done) == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        rank(folder=tmp_path, report=stop)
    fresh, resumed = runs_of_first_layer(), runs_of_first_layer(folder=tmp_path, resume=True)
    # Three of four width batches were saved; after them, one of two depth batches of the first round, whose
    # activations have to be made again.
    assert resumed[0] == (fresh[0] - 3 if stop_at[0] == "widths" else fresh[0] - 4)
    resumed = resumed[1]
    assert resumed.depth_ranking == importance.depth_ranking
    for dim, rows in importance.widths.items():
        for layer, scores in rows.items():
            torch.testing.assert_close(resumed.widths[dim][layer], scores, rtol=1e-6, atol=0)
    with pytest.raises(ProblemsError, match="saved with another config"):
        rank(config=RankConfig(samples=4, depth_samples=4, seq_length=LENGTH), folder=tmp_path, resume=True)


def test_ranks_agree_on_the_latest_common_step(tmp_path):
    states = [RunState(tmp_path, rank, {"a": 1}) for rank in range(2)]
    for step in (1, 2, 3):
        states[0].save(step, {"x": torch.tensor([step])}, {"step": step})
    for step in (1, 2):
        states[1].save(step, {"x": torch.tensor([step])}, {"step": step})
    assert states[0].steps() == [2, 3]
    assert states[1].latest(lambda mine: [s.steps() for s in states]) == 2
    assert states[0].load(2)[1] == {"step": 2}
    forget_states(tmp_path)
    assert not list(tmp_path.iterdir())


def test_samples_must_fill_the_data_parallel_ranks(pool4):
    with pytest.raises(AssertionError, match=r"rank\.samples: 6 must be a multiple of the 4 data-parallel ranks"):
        pool4.run(rank, config=RankConfig(samples=6, seq_length=LENGTH))


def sorted_logits(sp=False):
    """Logits `[b, s, v/tp]` before and after sorting this rank's live model, and again after undoing it."""
    from nemo_elastic.importance.ranking import random_orders
    from nemo_elastic.mcore.ranking.stack_forward import Groups, StackForward
    from nemo_elastic.space.dims import WIDTH_DIMS

    orders = random_orders(layout_of(TINY), WIDTH_DIMS, torch.Generator().manual_seed(3))
    model, tokens = load(build(TINY, sp=sp), TINY, whole_tensors(TINY)), token_batches(TINY, 1)[0]

    def finals():
        stack = StackForward(model, Groups.from_megatron())
        final = stack.all_layers(tokens)
        stack.wait()
        return final @ stack.output_weight().t() if stack.is_last else None

    before = finals()
    sort_model(model, layout_of(TINY), orders)
    after = finals()
    sort_model(model, layout_of(TINY), orders, inverse=True)
    return before, after, finals()


@pytest.mark.parametrize(
    ("layout", "sp"), [({"tp": 2}, False), ({"tp": 4}, True), ({"tp": 2, "pp": 2}, True), ({"pp": 4}, False)], ids=str
)
def test_a_live_model_is_sorted_at_any_layout(pool4, layout, sp):
    seen = 0
    for before, after, undone in pool4.run(sorted_logits, sp, **layout):
        if before is not None:
            seen += 1
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
            assert torch.equal(undone, before)
    assert seen


def test_sorting_a_live_model_is_sorting_its_weights(one_rank):
    from nemo_elastic.importance.ranking import random_orders

    layout = layout_of(TINY)
    orders = random_orders(layout, ["hidden_size", "ffn_hidden_size"], torch.Generator().manual_seed(3))
    model = load(build(TINY), TINY, whole_tensors(TINY))
    sort_model(model, layout, orders)
    other = load(build(TINY), TINY, dict(sort_tensors(whole_tensors(TINY).items(), layout, orders)))
    tokens = own_batches(TINY, 1)[0]
    assert torch.equal(logits_of(model, tokens), logits_of(other, tokens))


def test_a_bf16_parent_is_ranked_in_fp32_sums(one_rank, importance):
    """Weights and activations in bf16, as on a GPU: scores within its rounding, the same layers at both ends."""
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights

    model = build_plain_model(TINY, bf16=True, params_dtype=torch.bfloat16).eval()
    load_weights(model, whole_tensors(TINY), TINY)
    ranked = rank_parent(model, layout_of(TINY), CONFIG, sample, min_layers=5)
    for dim, rows in importance.widths.items():
        for layer, scores in rows.items():
            assert ranked.widths[dim][layer].dtype == torch.float32
            torch.testing.assert_close(ranked.widths[dim][layer], scores, rtol=0.05, atol=0.01)
    assert ranked.depth_ranking[-1] == importance.depth_ranking[-1]
    assert ranked.depth_scores == pytest.approx(importance.depth_scores, rel=0.05)
