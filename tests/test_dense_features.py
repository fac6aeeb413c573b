"""Gated MLPs, rotary positions, norms of queries and keys, biases, multipliers: masked == sliced == extracted."""

from typing import Any

import pytest
import torch
from dense_features import FEATURES, TRANSFORMER, parts
from plain_child import extracted
from pool_elastic import (
    elastic_model,
    layout_of,
    one_hot_masks,
    random_weights,
    run_plan,
    tokens,
)
from small_parent import FFN_GROUPS, space_of
from test_elastic_modes import assert_same_gradients, difference

from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
from nemo_elastic.mcore.models.build import build_plain_model, load_weights
from nemo_elastic.space.subnet import Subnet

pytestmark = pytest.mark.usefixtures("one_rank")
FP64 = torch.float64
PARENTS = {f"{name}-{where}": (name, where) for name in FEATURES for where in ("hybrid", "transformer")}
CUTS: dict[str, dict[str, Any]] = {
    "widths": {"hidden_size": 20, "ffn_hidden_size": 24, "num_attention_heads": 4},
    "dropped": {"hidden_size": 36, "ffn_hidden_size": 16, "num_attention_heads": 8, "layers": (0, 2, 3, 5)},
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def parent(request: pytest.FixtureRequest, name: str) -> tuple[Any, Any, dict[str, Any]]:
    feature, where = PARENTS[name]
    pattern = TRANSFORMER if where == "transformer" else None
    arch, function = parts(feature, pattern, share_embeddings_and_output_weights=request.param)
    return arch, elastic_model(arch, FP64, function=function), function


def cut(arch: Any, name: str) -> Subnet:
    return space_of(arch).subnet(**CUTS[name])


@pytest.mark.parametrize("name", list(PARENTS))
def test_masked_is_sliced_is_extracted(parent: tuple[Any, Any, dict[str, Any]]) -> None:
    arch, model, function = parent
    layout, ids = layout_of(arch), tokens(arch)
    weights = random_weights(arch, FP64)
    for case in CUTS:
        subnet = cut(arch, case)
        found = {mode: run_plan(model, ids, hard_plan(layout, subnet, mode), layout) for mode in ("masked", "sliced")}
        soft = soft_plan(layout, space_of(arch).full_subnet(), one_hot_masks(arch, subnet))
        found["soft"] = run_plan(model, ids, soft, layout)
        of_child, own = extracted(arch, subnet, function, weights, layout, ids)
        for mode, (logits, gradients) in found.items():
            assert difference(logits, of_child) < 1e-10, (case, mode)
            assert_same_gradients(gradients, own, 1e-10)


@pytest.mark.parametrize("name", list(PARENTS))
def test_the_full_subnet_is_the_plain_model_bit_for_bit(parent: tuple[Any, Any, dict[str, Any]]) -> None:
    arch, model, function = parent
    layout, ids = layout_of(arch), tokens(arch)
    plain = build_plain_model({**vars(arch), **function}, params_dtype=FP64)
    load_weights(plain, random_weights(arch, FP64), arch, ffn_groups=FFN_GROUPS)
    logits = plain(ids, None, None)
    for mode in ("masked", "sliced"):
        assert torch.equal(
            run_plan(model, ids, hard_plan(layout, space_of(arch).full_subnet(), mode), layout)[0], logits
        )
    assert torch.equal(run_plan(model, ids, None, layout)[0], logits)


@pytest.mark.parametrize("feature", list(FEATURES))
def test_every_feature_changes_the_function(feature: str) -> None:
    """On the same weights, where it has no parameters of its own: a field that nothing reads would change nothing."""
    arch, function = parts(feature)
    plain, _ = parts("gelu", **{"activation_func": "gelu"} if feature == "-" else {})
    ids = tokens(arch)
    with torch.no_grad():
        logits = elastic_model(arch, FP64, function=function)(ids, None, None)
        without = {n: v for n, v in function.items() if n == "activation_func" and feature != "gelu"}
        if arch == plain or function.keys() - without.keys():
            assert difference(elastic_model(arch, FP64, function=without)(ids, None, None), logits) > 1e-3
        for row in (n for n in layout_of(arch).table if n not in layout_of(plain).table):
            weights = random_weights(arch, FP64)
            weights[row] = weights[row] * 1.5 + 0.1
            model = elastic_model(arch, FP64, function=function)
            load_weights(model, weights, arch, ffn_groups=FFN_GROUPS)
            assert difference(model(ids, None, None), logits) > 1e-4, row
