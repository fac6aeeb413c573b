"""masked == sliced == extracted, one process: values, gradients, gates, soft masks, recomputation.

Norm weights, biases and A are random. Tolerances are relative to the largest entry.
"""

import random
from typing import Any

import pytest
import torch
from megatron.core.ssm import mamba_mixer
from plain_child import load_child, plain_child
from pool_elastic import (
    elastic_model,
    gates,
    gradients,
    layout_of,
    one_hot_masks,
    plan_and_values,
    project,
    random_weights,
    run_plan,
    soft_masks,
    tokens,
)
from small_parent import FFN_GROUPS, architecture, random_subnet, space_of
from torch import Tensor

from nemo_elastic.mcore.elastic.model import refuse_overlap
from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights, transformer_config
from nemo_elastic.mcore.versions import parameter_name
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.slicing import accumulate, scatter
from nemo_elastic.space.subnet import Subnet

pytestmark = pytest.mark.usefixtures("one_rank")

WIDTHS = {
    "hidden_size": 20,
    "ffn_hidden_size": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 5,
    "num_attention_heads": 4,
}
PER_LAYER = {"ffn_hidden_size": (64, 16, 36), "mamba_num_heads": (4, 12, 8), "num_attention_heads": (4, 8)}
# Parent: M0 -1 M2 *3 M4 -5 *6 -7
SUBNETS: dict[str, dict[str, Any]] = {
    "full": {},
    **{name: {name: size} for name, size in WIDTHS.items()},
    "all_widths": WIDTHS,
    "smallest": {
        "hidden_size": 4,
        "ffn_hidden_size": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 1,
        "num_attention_heads": 4,
    },
    "per_layer": {**PER_LAYER, "hidden_size": 36, "mamba_head_dim": 6},
    "first_dropped": {"layers": (1, 2, 3, 4, 5, 6, 7)},
    "last_dropped": {"layers": (0, 1, 2, 3, 4, 5, 6)},
    "two_in_a_row_dropped": {"layers": (0, 1, 4, 5, 6, 7)},
    "no_mamba": {"layers": (1, 3, 5, 6, 7)},
    "one_layer": {"layers": (3,)},
    "everything": {**PER_LAYER, "hidden_size": 20, "mamba_head_dim": 5, "layers": (1, 2, 4, 6)},
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
GRADIENT_TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-10}  # of every parameter by itself
# Megatron's mixer computes A and dt in fp32 whatever the model's dtype, so their gradients are rounded to fp32.
FP32_PARAMETERS = ("A_log", "dt_bias")


def subnet_of(name: str) -> Subnet:
    return space_of(architecture()).subnet(**SUBNETS[name])


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        limit = max(tolerance, 1e-6) if name.endswith(FP32_PARAMETERS) else tolerance
        if not expected[name].any():
            assert not found[name].any(), name
        else:
            assert difference(found[name], expected[name]) < limit, name


SETTINGS = {f"{name}{'-tied' * tied}": (tied, dtype) for name, dtype in DTYPES.items() for tied in (False, True)}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def setting(request: pytest.FixtureRequest) -> tuple[Any, Any, torch.dtype]:
    tied, dtype = request.param
    arch = architecture(share_embeddings_and_output_weights=tied)
    return arch, elastic_model(arch, dtype), dtype


@pytest.mark.parametrize("name", list(SUBNETS))
def test_masked_is_sliced_is_extracted(setting: tuple[Any, Any, torch.dtype], name: str) -> None:
    arch, model, dtype = setting
    layout, subnet, ids = layout_of(arch), subnet_of(name), tokens(arch)
    masked, masked_gradients = run_plan(model, ids, hard_plan(layout, subnet, "masked"), layout)
    sliced, sliced_gradients = run_plan(model, ids, hard_plan(layout, subnet, "sliced"), layout)

    weights = random_weights(arch, dtype)
    child = plain_child(arch, subnet, params_dtype=dtype)
    assert not [m for m in child.modules() if type(m).__module__.startswith("nemo_elastic.mcore.elastic")]
    load_child(child, weights, layout, subnet)
    extracted = child(ids, None, None)
    project(extracted).backward()
    rows = {name: (spec, sizes) for name, spec, sizes in layout.child_params(subnet)}
    own = {n: torch.zeros_like(w) for n, w in weights.items()}
    for n, p in child.named_parameters():
        row = rows[parameter_name(n)]
        accumulate(p.grad, *row, own[row[0].name])

    assert difference(masked, extracted) < TOLERANCE[dtype]
    assert difference(sliced, extracted) < TOLERANCE[dtype]
    tolerance = GRADIENT_TOLERANCE[dtype]
    assert_same_gradients(masked_gradients, own, tolerance)
    assert_same_gradients(sliced_gradients, own, tolerance)
    for spec_name, spec in layout.table.items():  # exactly zero outside the kept part
        kept = torch.zeros(spec.shape({}), dtype=dtype)
        if spec.layer is None or spec.layer in subnet.layers:
            sizes = layout.sizes(subnet, spec.layer)
            scatter(torch.ones(spec.shape(sizes), dtype=dtype), spec, sizes, kept)
        assert not masked_gradients[spec_name][kept == 0].any()
        assert not sliced_gradients[spec_name][kept == 0].any()


@pytest.mark.parametrize("mode", ["masked", "sliced"])
def test_the_full_subnet_is_the_plain_model_bit_for_bit(setting: tuple[Any, Any, torch.dtype], mode: str) -> None:
    arch, model, dtype = setting
    layout, ids = layout_of(arch), tokens(arch)
    plain = build_plain_model(arch, params_dtype=dtype)
    load_weights(plain, random_weights(arch, dtype), arch, ffn_groups=FFN_GROUPS)
    logits = plain(ids, None, None)
    project(logits).backward()
    found, found_gradients = run_plan(model, ids, hard_plan(layout, subnet_of("full"), mode), layout)
    assert torch.equal(found, logits)
    assert_same_gradients(found_gradients, gradients(plain, layout), 1e-6 if dtype == torch.float32 else 1e-14)
    without, without_gradients = run_plan(model, ids, None, layout)
    assert torch.equal(without, logits)
    assert all(torch.equal(g, without_gradients[n]) for n, g in gradients(plain, layout).items())


@pytest.mark.parametrize("mode", ["masked", "sliced"])
def test_losses_and_hidden_states_are_those_of_the_logits(setting: tuple[Any, Any, torch.dtype], mode: str) -> None:
    arch, model, dtype = setting
    plan, ids = hard_plan(layout_of(arch), subnet_of("everything"), mode), tokens(arch, length=17)
    with torch.no_grad():
        logits = model(ids[:, :-1], None, None, elastic=plan)
        losses = model(ids[:, :-1], None, None, labels=ids[:, 1:].contiguous(), elastic=plan)
        hidden = model(ids[:, :-1], None, None, elastic=plan, hidden_only=True)
        again = model.logits(hidden, plan).transpose(0, 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none")
    assert difference(losses.flatten().double(), expected) < 1e-5
    assert hidden.shape == (16, 2, 20 if mode == "sliced" else 48)
    assert difference(again, logits) < TOLERANCE[dtype]


@pytest.fixture(scope="module")
def double() -> Any:
    return elastic_model(architecture(), torch.float64)


@pytest.mark.parametrize("name", ["full", "all_widths", "per_layer", "everything"])
def test_gates_have_the_same_gradients_in_both_modes(double: Any, name: str) -> None:
    """Against finite differences of the masked forward as well."""
    arch, subnet, ids = architecture(), subnet_of(name), tokens(architecture())
    layout, found = layout_of(arch), {}
    for mode in ("masked", "sliced"):
        values = gates(arch)
        run_plan(double, ids, hard_plan(layout, subnet, mode, values), layout)
        found[mode] = {n: v.grad for n, v in values.items()}
    for n in found["masked"]:
        assert difference(found["sliced"][n], found["masked"][n]) < 1e-10, n
    step = 1e-6
    generator = torch.Generator().manual_seed(9)
    for n, gradient in found["masked"].items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                project(double(ids, None, None, elastic=hard_plan(layout, subnet, "masked", gates(arch) | {n: g})))
                for g in (1 + step * direction, 1 - step * direction)
            )
        slope = (up - down) / (2 * step)
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-6), n
        assert gradient.any(), n


@pytest.mark.parametrize("name", ["full", "all_widths", "per_layer", "everything", "one_layer"])
def test_one_hot_soft_masks_are_the_hard_plan(double: Any, name: str) -> None:
    arch, subnet, ids = architecture(), subnet_of(name), tokens(architecture())
    layout = layout_of(arch)
    hard, hard_gradients = run_plan(double, ids, hard_plan(layout, subnet, "masked"), layout)
    plan = soft_plan(layout, space_of(arch).full_subnet(), one_hot_masks(arch, subnet))
    soft, soft_gradients = run_plan(double, ids, plan, layout)
    assert difference(soft, hard) < 1e-12
    assert_same_gradients(soft_gradients, hard_gradients, 1e-10)


def test_soft_masks_against_finite_differences(double: Any) -> None:
    arch, ids = architecture(), tokens(architecture())
    layout, full, masks = layout_of(arch), space_of(arch).full_subnet(), soft_masks(arch)
    run_plan(double, ids, soft_plan(layout, full, masks), layout)
    generator, step = torch.Generator().manual_seed(2), 1e-6
    for n, mask in masks.items():
        direction = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                project(double(ids, None, None, elastic=soft_plan(layout, full, masks | {n: mask + d * direction})))
                for d in (step, -step)
            )
        slope = (mask.grad * direction).sum().item()
        assert ((up - down) / (2 * step)).item() == pytest.approx(slope, rel=1e-5, abs=1e-6), n
        assert mask.grad.all(), n


def test_dims_that_are_not_learned_may_be_left_out(double: Any) -> None:
    """Soft masks of some dims only: the others are whole."""
    arch, ids = architecture(), tokens(architecture())
    layout, full, masks = layout_of(arch), space_of(arch).full_subnet(), soft_masks(arch)
    with torch.no_grad():
        for n, mask in masks.items():
            ones = {k: torch.ones_like(v) for k, v in masks.items()} | {n: mask}
            alone = double(ids, None, None, elastic=soft_plan(layout, full, {n: mask}))
            assert difference(alone, double(ids, None, None, elastic=soft_plan(layout, full, ones))) < 1e-12, n


@pytest.mark.parametrize("tied", [False, True])
def test_buffers_receive_what_autograd_would(tied: bool) -> None:
    """Sliced gradients go into the slice of `main_grad`; twice in a row they add up; nothing full-size is made."""
    arch = architecture(share_embeddings_and_output_weights=tied)
    model, layout, ids = elastic_model(arch, torch.float64), layout_of(arch), tokens(arch)
    subnet = subnet_of("everything")
    plan = hard_plan(layout, subnet, "sliced")
    _, expected = run_plan(model, ids, plan, layout)
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)
    run_plan(model, ids, plan, layout)
    project(model(ids, None, None, elastic=plan)).backward()
    twice = gradients(model, layout)
    assert_same_gradients(twice, {n: 2 * g for n, g in expected.items()}, 1e-10)
    for name, p in model.named_parameters():
        spec = layout.spec(parameter_name(name))
        if spec.layer in subnet.layers and spec.numel(layout.sizes(subnet, spec.layer)) < spec.numel({}):
            assert p.grad is None, name


def test_bf16_weights_add_to_fp32_buffers(double: Any) -> None:
    """Against fp64; the masked mode in bf16 is as far from it as the sliced one."""
    arch = architecture()
    model, layout, ids = elastic_model(arch, torch.bfloat16), layout_of(arch), tokens(architecture())
    subnet, errors = subnet_of("everything"), {}
    exact, exact_gradients = run_plan(double, ids, hard_plan(layout, subnet, "sliced"), layout)
    for mode in ("masked", "sliced"):
        for p in model.parameters():
            p.main_grad = torch.zeros(p.shape, dtype=torch.float32)
        logits, _ = run_plan(model, ids, hard_plan(layout, subnet, mode), layout)
        assert logits.dtype == torch.bfloat16
        found = torch.cat(
            [p.main_grad.flatten() + (0 if p.grad is None else p.grad.flatten()) for p in model.parameters()]
        )
        expected = torch.cat(
            [exact_gradients[layout.canonical_name(parameter_name(n))].flatten() for n, _ in model.named_parameters()]
        )
        errors[mode] = [((f - e).norm() / e.norm()).item() for f, e in ((logits, exact), (found, expected))]
    for masked, sliced in zip(*errors.values(), strict=True):
        assert sliced < 0.08 and sliced < 1.5 * masked


@pytest.mark.parametrize("mode", ["masked", "sliced"])
def test_dropped_layers_get_no_gradient_and_no_work(double: Any, mode: str) -> None:
    arch, subnet, ids = architecture(), subnet_of("everything"), tokens(architecture())
    double.zero_grad(set_to_none=True)
    called = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in double.named_modules()
        if name.startswith("decoder.layers.")
    ]
    project(double(ids, None, None, elastic=hard_plan(layout_of(arch), subnet, mode))).backward()
    for hook in hooks:
        hook.remove()
    for name, p in double.named_parameters():
        if name.startswith("decoder.layers."):
            assert (p.grad is None) == (int(name.split(".")[2]) not in subnet.layers), name
    assert {int(name.split(".")[2]) for name in called} <= set(subnet.layers)


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


@pytest.mark.parametrize("kind", list(RECOMPUTE))
def test_recomputation_changes_nothing(double: Any, kind: str) -> None:
    arch, ids = architecture(), tokens(architecture())
    layout, space, rng = layout_of(arch), space_of(arch), random.Random(4)
    model = elastic_model(arch, torch.float64, **RECOMPUTE[kind]).train()
    cases = [("sliced", random_subnet(space, rng, per_layer=True)), ("masked", subnet_of("everything")), ("soft", None)]
    for case in cases:
        results = []
        for m in (double, model):
            plan, values = plan_and_values(arch, layout, case)
            logits, found = run_plan(m, ids, plan, layout)
            results.append((logits, found, {n: v.grad for n, v in values.items()}))
        (logits, expected, expected_gates), (again, found, found_gates) = results
        assert difference(again, logits) < 1e-13
        assert_same_gradients(found, expected, 1e-12)
        for n in expected_gates:
            assert difference(found_gates[n], expected_gates[n]) < 1e-12, n


@pytest.mark.parametrize(
    ("kind", "times"), [(None, (1, 1, 1)), ("full", (2, 2, 2)), ("core_attn", (1, 2, 1)), ("mlp", (1, 1, 2))]
)
def test_recomputation_happens(monkeypatch: pytest.MonkeyPatch, kind: str | None, times: tuple[int, int, int]) -> None:
    """Forwards of Mamba scan, attention kernel and MLP, so that "changes nothing" says something."""
    from megatron.core.ssm import mamba_mixer

    arch, called = architecture("M*-"), [0, 0, 0]
    model = elastic_model(arch, **RECOMPUTE.get(kind, {})).train()

    def counted(position: int, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            called[position] += 1
            return function(*args, **kwargs)

        return run

    scan, attention, mlp = (
        mamba_mixer.mamba_split_conv1d_scan_combined,
        model.decoder.layers[1],
        model.decoder.layers[2],
    )
    monkeypatch.setattr(mamba_mixer, "mamba_split_conv1d_scan_combined", counted(0, scan))
    kernel = attention.self_attention.sliced_attention
    monkeypatch.setattr(kernel, "forward", counted(1, kernel.forward))
    monkeypatch.setattr(mlp.mlp, "elastic", counted(2, mlp.mlp.elastic))
    run_plan(model, tokens(arch), hard_plan(layout_of(arch), space_of(arch).subnet(**WIDTHS)), layout_of(arch))
    assert tuple(called) == times


def test_masks_are_made_once_and_outlive_inference_mode() -> None:
    arch = architecture()
    model, layout, ids = elastic_model(arch), layout_of(arch), tokens(arch)
    plan = hard_plan(layout, subnet_of("all_widths"), "masked")
    with torch.inference_mode():
        model(ids, None, None, elastic=plan)
    caches = [m.masks for m in model.modules() if hasattr(m, "masks")]
    before = [dict(c._made) for c in caches]
    run_plan(model, ids, plan, layout)
    for cache, made in zip(caches, before, strict=True):
        assert cache._made.keys() == made.keys() and all(cache._made[k] is made[k] for k in made)
    assert any(before)


@pytest.mark.parametrize("case", ["sliced", "masked", "soft"])
def test_the_forward_never_waits_for_a_value(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """No `.item()`, no `bool(tensor)`, no list of values: on a GPU each would stop the host."""
    arch = architecture()
    model, layout, ids = elastic_model(arch), layout_of(arch), tokens(arch)
    plan, _ = plan_and_values(arch, layout, (case, subnet_of("everything")))

    def refuse(*_: Any) -> None:
        raise AssertionError("the forward reads a tensor's value on the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    logits = model(ids, None, None, elastic=plan)
    logits.sum().backward()


def test_overlapped_communication_is_refused() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig

    refuse_overlap(DistributedDataParallelConfig())
    with pytest.raises(ValueError, match="overlap_grad_reduce, overlap_param_gather cannot be true"):
        refuse_overlap(DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True))


def test_the_scan_gates_in_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its gate z, mamba-ssm before 2.3 gets the gradient of D wrong; the fused kernel has the gate inside."""
    arch, gated, kernel = architecture(), [], mamba_mixer.mamba_chunk_scan_combined
    monkeypatch.setattr(
        mamba_mixer, "mamba_chunk_scan_combined", lambda *a, **k: gated.append(k["z"]) or kernel(*a, **k)
    )
    model, layout = elastic_model(arch, torch.float64), layout_of(arch)
    model(tokens(arch), None, None, elastic=plan_and_values(arch, layout, ("soft", None))[0])
    assert len(gated) == 3 and all(z.shape == (2, 16, 12, 8) for z in gated)


@pytest.mark.parametrize("field", ["fp8", "fp4"])
def test_low_precision_is_refused(field: str) -> None:
    config = transformer_config(architecture())
    setattr(
        config, field, "e2m1" if field == "fp4" else "hybrid"
    )  # later than Megatron's own check of Transformer Engine
    with pytest.raises(ProblemsError, match=rf"model\.{field}: .* never entered under a plan"):
        build_elastic_model(architecture(), config, ffn_groups=FFN_GROUPS)
