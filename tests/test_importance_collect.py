"""Width scores do not depend on the parallel layout, and are what an independent sum over logged activations gives."""

import pytest
import torch
from pool_importance import (
    BATCH,
    LENGTH,
    TINY,
    build,
    collect,
    layout_of,
    load,
    token_batches,
    whole_tensors,
)

from nemo_elastic.importance.ranking import width_orders
from nemo_elastic.mcore.ranking.collect import WidthSettings, collect_widths

SITES = [
    ("linear_fc2_input", "out_proj_input", "mean_l2"),
    ("linear_fc1_output", "in_proj_x", "l2_l2"),
    ("linear_fc2_input", "out_proj_contribution", "mean_mean"),
]


@pytest.fixture(scope="module", params=SITES, ids="/".join)
def single(request, one_rank):
    return request.param, collect(False, *request.param)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for dim, rows in theirs.items():
        assert ours[dim].keys() == rows.keys()
        for layer, scores in rows.items():
            torch.testing.assert_close(ours[dim][layer], scores, rtol=1e-5, atol=0)
    ours, theirs = (width_orders(w, layout_of(TINY)) for w in (ours, theirs))
    for layer, by_dim in theirs.items():
        for dim, order in by_dim.items():
            assert torch.equal(ours[layer][dim], order), (layer, dim)


@pytest.mark.parametrize(
    ("layout", "sp"), [({"tp": 2}, False), ({"tp": 2}, True), ({"pp": 2}, False), ({}, False)], ids=str
)
def test_two_processes_give_the_single_scores(pool2, single, layout, sp):
    for scores in pool2.run(collect, sp, *single[0], **layout):
        assert_same(scores, single[1])


@pytest.mark.parametrize("single", SITES[:1], indirect=True, ids="/".join)
@pytest.mark.parametrize(
    ("layout", "sp"),
    [({"tp": 2, "pp": 2}, True), ({"tp": 4}, False), ({"pp": 4}, False), ({"tp": 2}, False)],
    ids=str,
)
def test_four_processes_give_the_single_scores(pool4, single, layout, sp):
    for scores in pool4.run(collect, sp, *single[0], **layout):
        assert_same(scores, single[1])


def test_scores_are_those_of_the_formula(one_rank):
    """Independent reference: log whole activations, then METHOD section 3 in two lines per dim."""
    model, batches = load(build(TINY), TINY, whole_tensors(TINY)), token_batches(TINY, 3)
    scores = collect_widths(model, batches, layout_of(TINY), WidthSettings(mamba_site="out_proj_input", top_channels=4))
    into_last = {
        "M": lambda layer: layer.mixer.out_proj,
        "*": lambda layer: layer.self_attention.linear_proj,
        "-": lambda layer: layer.mlp.linear_fc2,
    }
    log = {}
    for number, layer in enumerate(model.decoder.layers):
        linear = into_last[TINY.hybrid_override_pattern[number]](layer)
        linear.register_forward_hook(lambda m, a, o, n=number: log.setdefault(n, []).append(a[0]))
    norm = model.decoder.layers[0].norm
    norm.register_forward_hook(lambda m, a, o: log.setdefault("norm", []).append(o))
    with torch.no_grad():
        for tokens in batches:
            model(tokens, torch.arange(LENGTH).expand(BATCH, LENGTH), None)
    per_channel = {n: torch.cat(a, dim=1).abs().mean(0).pow(2).sum(0).sqrt() for n, a in log.items()}
    torch.testing.assert_close(scores["hidden_size"][0], per_channel["norm"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores["ffn_hidden_size"][1], per_channel[1], rtol=1e-5, atol=1e-7)
    heads = per_channel[3].view(TINY.num_attention_heads, TINY.kv_channels).pow(2).sum(1).sqrt()
    torch.testing.assert_close(scores["num_attention_heads"][3], heads, rtol=1e-5, atol=1e-7)
    pairs = per_channel[4].view(TINY.mamba_num_heads, TINY.mamba_head_dim)
    channels = pairs.pow(2).sum(0).sqrt()
    torch.testing.assert_close(scores["mamba_head_dim"][4], channels, rtol=1e-5, atol=1e-7)
    top = channels.topk(4).indices
    torch.testing.assert_close(scores["mamba_num_heads"][4], pairs[:, top].pow(2).sum(1).sqrt(), rtol=1e-5, atol=1e-7)


def test_hooks_are_gone_afterwards_and_do_not_change_the_model(one_rank):
    model, tokens = load(build(TINY), TINY, whole_tensors(TINY)), token_batches(TINY, 1)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    before = model(tokens[0], positions, None)
    collect_widths(model, tokens, layout_of(TINY))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(tokens[0], positions, None), before)


def test_a_contribution_is_the_norm_of_what_reaches_the_residual_stream(one_rank):
    """`out_proj_contribution`: through the projection itself, head by head and channel by channel."""
    model, batches = load(build(TINY), TINY, whole_tensors(TINY)), token_batches(TINY, 2)
    scores = collect_widths(model, batches, layout_of(TINY), WidthSettings(mamba_site="out_proj_contribution"))
    inputs, projection = [], model.decoder.layers[0].mixer.out_proj
    projection.register_forward_hook(lambda m, a, o: inputs.append(a[0].detach()))
    with torch.no_grad():
        for tokens in batches:
            model(tokens, torch.arange(LENGTH).expand(BATCH, LENGTH), None)
    y, weight = torch.cat(inputs, dim=1), projection.weight.detach()  # [s, b, heads * p], [h, heads * p]

    def importance(per_token):  # [s, b] -> scalar
        return per_token.mean(0).square().sum().sqrt()

    p, inner = TINY.mamba_head_dim, TINY.mamba_num_heads * TINY.mamba_head_dim
    heads = [(y[..., i : i + p] @ weight[:, i : i + p].t()).norm(dim=-1) for i in range(0, inner, p)]
    expected = torch.stack([importance(h) for h in heads])
    torch.testing.assert_close(scores["mamba_num_heads"][0], expected, rtol=1e-5, atol=1e-7)
    pairs = [importance((y[..., c, None] * weight[:, c]).norm(dim=-1)) for c in range(inner)]
    expected = torch.stack(pairs).view(-1, p).norm(dim=0)
    torch.testing.assert_close(scores["mamba_head_dim"][0], expected, rtol=1e-5, atol=1e-7)
