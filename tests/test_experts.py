"""Mixtures of experts: masked == sliced == extracted == soft at 0 and 1, whatever the bias; routing == Megatron's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expert_features import FEATURES, parts
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from plain_child import extracted
from pool_elastic import layout_of, one_hot_masks, project, random_weights, run_plan, tokens
from pool_plain import sharded_tensors
from small_parent import FFN_GROUPS, space_of
from test_elastic_modes import assert_same_gradients, difference

from nemo_elastic.config.model_fields import model_problems
from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
from nemo_elastic.mcore.kernels import kind_modules
from nemo_elastic.mcore.kernels.routing import chosen
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights, transformer_config
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


def test_a_cast_leaves_the_bias_and_the_weights_of_others() -> None:
    arch, function = parts("nemotron")
    model = build_plain_model({**vars(arch), **function})
    router = model.decoder.layers[1].mlp.router
    value = torch.linspace(0.1, 0.9, arch.num_moe_experts)
    router.expert_bias.data.copy_(value)
    model.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16 and router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, value) and not torch.equal(value, value.bfloat16().float())
    assert router.local_tokens_per_expert.dtype == torch.float32


def test_a_mixtures_router_is_no_elastic_router() -> None:
    """It has the model's learning rate, and decays."""
    from nemo_elastic.mcore.family.gradients import of_router
    from nemo_elastic.nemo.run.train import decays_not, is_router

    gate, elastic = "module.module.decoder.layers.1.mlp.router.weight", "module.module.router.net.0.weight"
    weight = torch.zeros(2, 2)
    for name, expected in ((gate, False), (elastic, True), ("router.net.0.weight", True)):
        assert of_router(name) == is_router(name, weight) == decays_not(name, weight) == expected, name


def test_other_stacks_layers_are_kept_but_for_experts() -> None:
    """Transformer Engine's own layers stay; its mixture has other parameters than the table."""
    others = kind_modules.StackSubmodules(**{field: field for field, _ in kind_modules.SLOTS.values()})
    found = kind_modules.stack_submodules(lambda kind: kind.letter, "ME*-", others=others)
    assert found.moe_layer == "E"
    assert (found.mamba_layer, found.attention_layer, found.mlp_layer) == (
        "mamba_layer", "attention_layer", "mlp_layer",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias"),
        ({"moe_router_topk": 1}, "moe_router_topk"),
        ({"moe_router_topk": 9}, "moe_router_topk"),
        ({"moe_router_score_function": "relu"}, "moe_router_score_function"),
        ({"moe_router_num_groups": 4}, "moe_router_num_groups"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"moe_ffn_hidden_size": None}, "moe_ffn_hidden_size"),
        ({"hybrid_override_pattern": "M-*-M-*-"}, "num_moe_experts"),
    ],
)
def test_what_no_router_here_does_is_refused(word: dict, key: str) -> None:
    arch, _ = parts("qwen")
    model = {name: value for name, value in vars(arch).items() if value and name != "mamba_conv_kernel"}
    assert model_problems(model) == []
    assert key in {problem.key.removeprefix("model.") for problem in model_problems({**model, **word})}


@pytest.mark.parametrize("feature", ["nemotron", "granite", "qwen", "softmax_first", "one"])
def test_a_mixture_is_megatrons(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MoELayer` with `SequentialMLP` on the same weights: output, and gradients of input and of every parameter."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer

    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)  # 0.16 forgets the name without TE
    arch, function = parts(feature)
    ours = build_plain_model({**vars(arch), **function}, params_dtype=FP64).decoder.layers[1].mlp
    config = transformer_config(
        {**vars(arch), **function}, params_dtype=FP64, moe_token_dispatcher_type="allgather",
        variable_seq_lengths=False, moe_router_load_balancing_type="none", moe_router_dtype="fp64",
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=arch.num_moe_experts, moe_grouped_gemm=False)
    theirs = MoELayer(config, submodules=spec.submodules, layer_number=2)
    theirs.set_layer_number(2)
    theirs.to(FP64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=FP64)
            parameter.copy_(values / parameter.shape[-1] ** 0.5)
        named = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if name.endswith("expert_bias"):
                theirs.router.expert_bias.copy_(parameter)
            elif ".experts." in f".{name}" and name.startswith("experts."):
                for expert, own in enumerate(parameter):
                    named[name.replace("experts.experts", f"experts.local_experts.{expert}")].copy_(own)
            else:
                named[name].copy_(parameter)
    x = torch.randn(6, 2, arch.hidden_size, generator=generator, dtype=FP64)
    outputs, inputs = [], []
    for module in (ours, theirs):
        inputs.append(x.clone().requires_grad_())
        outputs.append(module(inputs[-1])[0])
        project(outputs[-1]).backward()
    assert difference(outputs[0], outputs[1]) < 1e-6  # theirs rounds scores and weights to fp32
    assert difference(inputs[0].grad, inputs[1].grad) < 1e-5
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("experts."):
            places = [name.replace("experts.experts", f"experts.local_experts.{n}") for n in range(len(parameter))]
            grads = [named[place].grad for place in places]
            expected = torch.stack([torch.zeros_like(parameter[0]) if g is None else g for g in grads])
        else:
            expected = named[name].grad
        assert difference(parameter.grad, expected) < 1e-5, name
    keys = [{(t.key, tuple(t.global_shape)) for t in sharded_tensors(module)} for module in (ours, theirs)]
    assert keys[0] == keys[1]
