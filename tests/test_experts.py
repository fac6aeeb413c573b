"""Mixtures of experts: masked == sliced == extracted == soft at 0 and 1, whatever the bias; routing == Megatron's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expert_features import FEATURES, parts
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from plain_child import extracted
from pool_elastic import layout_of, one_hot_masks, random_weights, run_plan, tokens
from small_parent import FFN_GROUPS, space_of
from test_elastic_modes import assert_same_gradients, difference

from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
from nemo_elastic.mcore.kernels import kind_modules
from nemo_elastic.mcore.kernels.routing import chosen
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.problems import ProblemsError

pytestmark = pytest.mark.usefixtures("one_rank")
FP64 = torch.float64
CUTS: dict[str, dict[str, Any]] = {
    "experts": {"num_moe_experts": 4},
    "widths": {"hidden_size": 20, "num_moe_experts": 4, "moe_ffn_hidden_size": 8, "mamba_num_heads": 8},
    "shared": {"moe_shared_expert_intermediate_size": 12, "num_moe_experts": 4},
    "per_layer": {"num_moe_experts": (4, 8, 4), "moe_ffn_hidden_size": (16, 4, 12), "hidden_size": 36},
    "dropped": {"hidden_size": 36, "num_moe_experts": 4, "moe_ffn_hidden_size": 12, "layers": (0, 2, 3, 5)},
}


def weights_of(arch: Any, subnet: Any) -> dict[str, torch.Tensor]:
    """Random, with a bias that would give the dropped experts every token."""
    weights, count = random_weights(arch, FP64), arch.num_moe_experts // FFN_GROUPS
    for number, layer in enumerate(arch.layers_of("E")):
        bias = weights.get(f"decoder.layers.{layer}.mlp.router.expert_bias")
        if bias is not None:
            kept = subnet.num_moe_experts[number] // FFN_GROUPS
            bias.view(FFN_GROUPS, count)[:, kept:] += 100.0
    return weights


@pytest.mark.parametrize("case", list(CUTS))
@pytest.mark.parametrize("feature", list(FEATURES))
def test_masked_is_sliced_is_extracted(feature: str, case: str) -> None:
    arch, function = parts(feature)
    sizes = CUTS[case]
    if not arch.moe_shared_expert_intermediate_size:
        sizes = {n: s for n, s in sizes.items() if n != "moe_shared_expert_intermediate_size"}
    subnet, layout, ids = space_of(arch).subnet(**sizes), layout_of(arch), tokens(arch)
    weights = weights_of(arch, subnet)
    model = build_elastic_model({**vars(arch), **function}, ffn_groups=FFN_GROUPS, params_dtype=FP64)
    load_weights(model, weights, arch, ffn_groups=FFN_GROUPS)
    found = {mode: run_plan(model, ids, hard_plan(layout, subnet, mode), layout) for mode in ("masked", "sliced")}
    soft = soft_plan(layout, space_of(arch).full_subnet(), one_hot_masks(arch, subnet))
    found["soft"] = run_plan(model, ids, soft, layout)
    of_child, own = extracted(arch, subnet, function, weights, layout, ids)
    for mode, (logits, gradients) in found.items():
        assert difference(logits, of_child) < 1e-10, mode
        assert_same_gradients(gradients, own, 1e-10)


@pytest.mark.parametrize("feature", list(FEATURES))
def test_the_full_subnet_is_the_plain_model(feature: str) -> None:
    arch, function = parts(feature)
    layout, ids, full = layout_of(arch), tokens(arch), space_of(arch).full_subnet()
    models = [
        build({**vars(arch), **function}, params_dtype=FP64, **more)
        for build, more in ((build_plain_model, {}), (build_elastic_model, {"ffn_groups": FFN_GROUPS}))
    ]
    for model in models:
        load_weights(model, random_weights(arch, FP64), arch, ffn_groups=FFN_GROUPS)
    logits = models[0](ids, None, None)
    assert torch.equal(models[1](ids, None, None), logits)
    for mode in ("masked", "sliced"):
        assert difference(run_plan(models[1], ids, hard_plan(layout, full, mode), layout)[0], logits) < 1e-12


@pytest.mark.parametrize("feature", list(FEATURES))
def test_routing_is_megatrons(feature: str) -> None:
    arch, function = parts(feature)
    said = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": False,
            "moe_router_topk_scaling_factor": None, **function}  # fmt: skip
    config = SimpleNamespace(**said, moe_router_topk=arch.moe_router_topk)
    scores = torch.randn(64, arch.num_moe_experts, dtype=FP64)
    bias = torch.randn(arch.num_moe_experts, dtype=FP64) if arch.moe_router_enable_expert_bias else None
    weights, places = topk_routing_with_score_function(
        scores, arch.moe_router_topk, said["moe_router_pre_softmax"], None, None,
        said["moe_router_topk_scaling_factor"], said["moe_router_score_function"], bias,
    )  # fmt: skip
    ours, chosen_ones = chosen(config, scores, bias)
    assert torch.equal(chosen_ones, places) and difference(ours, weights) < 1e-6  # theirs goes through fp32


def test_a_line_of_megatron_without_a_slot_refuses_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind_modules, "SLOTS", {k: v for k, v in kind_modules.SLOTS.items() if k != "E"})
    words = r"'E' \(mixture of experts\) needs a newer megatron-core .*: install 0\.16"
    with pytest.raises(ProblemsError, match=words):
        kind_modules.megatron_pattern("ME*")
    assert kind_modules.megatron_pattern("M-*") == "M-*"
