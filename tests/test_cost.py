"""Costs against what is built, allocated and computed: parameters, memory, FLOPs."""

import random
from collections import defaultdict

import pytest
import torch
from dense_features import TRANSFORMER, parts
from megatron.core.inference.contexts import StaticInferenceContext
from plain_child import plain_child
from small_parent import FFN_GROUPS, architecture, random_subnet, space_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_elastic.cost.counts import (
    BYTE_PROFILES,
    flops,
    layer_flops,
    layer_parameters,
    memory,
    outer_parameters,
    parameters,
    parameters_by_kind,
)
from nemo_elastic.kinds import kind_of, kinds_of
from nemo_elastic.kinds.scan_chunk import scan_chunk_length
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.models.build import build_elastic_model
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

NANO_12B = Architecture(
    hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    hidden_size=5120,
    ffn_hidden_size=20480,
    num_attention_heads=40,
    num_query_groups=8,
    kv_channels=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    mamba_num_groups=8,
    mamba_state_dim=128,
    vocab_size=131072,
)
NEMOTRON_H_8B = Architecture(
    hybrid_override_pattern="M-" * 20 + "M*-M*-M*-M*-",
    hidden_size=4096,
    ffn_hidden_size=21504,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    mamba_num_heads=128,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    vocab_size=131072,
)


def formula(arch: Architecture, subnet: Subnet) -> int:
    """The closed forms of the method (one term a matrix), written without the table."""
    h, p, d = subnet.hidden_size, subnet.mamba_head_dim, arch.kv_channels
    state, kv = arch.mamba_num_groups * arch.mamba_state_dim, arch.num_query_groups
    total, position = h + (1 if arch.share_embeddings_and_output_weights else 2) * arch.vocab_size * h, defaultdict(int)
    for i, kind in enumerate(arch.hybrid_override_pattern):
        at = position[kind]
        position[kind] += 1
        if i not in subnet.layers:
            continue
        if kind == "M":
            m = subnet.mamba_num_heads[at]
            inner = m * p
            total += h + h * (2 * inner + 2 * state + m) + (inner + 2 * state) * (arch.mamba_conv_kernel + 1)
            total += 3 * m + inner + inner * h
        elif kind == "*":
            q = subnet.num_attention_heads[at]
            total += h + h * (q + 2 * kv) * d + q * d * h
        else:
            total += h + 2 * h * subnet.ffn_hidden_size[at]
    return total


@pytest.mark.parametrize(("arch", "count"), [(NANO_12B, 12_310_001_152), (NEMOTRON_H_8B, 8.101e9)])
def test_published_models(arch: Architecture, count: float) -> None:
    space = space_of(arch, 8)
    found = parameters(ParamLayout(arch), space.full_subnet())
    assert found == formula(arch, space.full_subnet())
    assert found == count if isinstance(count, int) else round(found / 1e9, 3) == count / 1e9


CHILDREN = {  # feature (none: the hybrid), pattern, how many random children
    "hybrid": ("", None, 110), "features": ("all", None, 40), "transformer": ("all", TRANSFORMER, 40),
    "nemotron": ("nemotron", None, 80), "granite": ("granite", None, 80), "latent": ("latent", None, 40),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", list(CHILDREN))
@pytest.mark.usefixtures("one_rank")
def test_parameters_are_those_of_the_built_child(name: str, tied: bool) -> None:
    """Random children, every fourth with per-layer widths: total, per kind, per layer."""
    feature, pattern, trials = CHILDREN[name]
    arch, function = parts(feature, pattern, share_embeddings_and_output_weights=tied)
    space, layout, rng = space_of(arch), ParamLayout(arch, ffn_groups=FFN_GROUPS), random.Random(int(tied))
    seen = set()
    for trial in range(trials):
        subnet = random_subnet(space, rng, per_layer=trial % 4 == 0)
        child = plain_child(arch, subnet, function, perform_initialization=False)
        assert parameters(layout, subnet) == sum(p.numel() for p in child.parameters())
        assert feature or parameters(layout, subnet) == formula(arch, subnet)
        kinds: dict[str, int] = defaultdict(int)
        for number, layer in enumerate(subnet.layers):
            kind, built = arch.hybrid_override_pattern[layer], child.decoder.layers[number]
            count = sum(p.numel() for p in built.parameters())
            assert layer_parameters(layout, kind, layout.sizes(subnet, layer)) == count
            kinds[kind_of(kind).name] += count
        outside = sum(p.numel() for n, p in child.named_parameters() if "layers" not in n)
        assert outer_parameters(layout, subnet.hidden_size) == outside
        by_kind = parameters_by_kind(layout, subnet)
        there = {kind.name: 0 for kind in kinds_of(arch.hybrid_override_pattern)}
        assert by_kind == {**there, **kinds, "embedding_and_output": outside}
        seen.add(subnet)
    assert len(seen) > 0.9 * trials


@pytest.mark.parametrize("profile", list(BYTE_PROFILES))
@pytest.mark.usefixtures("one_rank")
def test_memory_is_what_inference_allocates(profile: str) -> None:
    """Weights, KV cache, SSM and convolution state as Megatron's own modules allocate them."""
    arch = architecture()
    space, layout, rng = space_of(arch), ParamLayout(arch, ffn_groups=FFN_GROUPS), random.Random(5)
    batch, length, byte = 3, 24, BYTE_PROFILES[profile]
    for trial in range(12):
        subnet = random_subnet(space, rng, per_layer=trial % 4 == 0)
        child = plain_child(arch, subnet, perform_initialization=False)
        elements = dict.fromkeys(("kv_cache", "ssm_state", "conv_state"), 0)
        for layer in child.decoder.layers:
            if hasattr(layer, "mixer"):
                conv, ssm = layer.mixer._get_states_from_cache(StaticInferenceContext(batch, length), batch)
                elements["conv_state"] += conv.numel()
                elements["ssm_state"] += ssm.numel()
            elif hasattr(layer.self_attention, "_allocate_memory"):
                attention = layer.self_attention
                cache = attention._allocate_memory(length, batch, attention.hidden_size_per_attention_head, torch.float)
                elements["kv_cache"] += 2 * cache.numel()
        found = memory(layout, subnet, batch_size=batch, sequence_length=length, profile=byte)
        weights = sum(p.numel() for p in child.parameters())
        assert found.weights == pytest.approx(weights * byte.weights, rel=1e-12)
        assert found.kv_cache == pytest.approx(elements["kv_cache"] * byte.kv_cache, rel=1e-12)
        assert found.ssm_state == elements["ssm_state"] * byte.state
        assert found.conv_state == elements["conv_state"] * byte.state
        assert found.total == pytest.approx(sum(v for k, v in found.to_dict().items() if k != "total"))


def baddbmm_flops(into: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Torch's counter knows the out-of-place product only."""
    return 2 * a[0] * a[1] * a[2] * b[2]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("feature", ["", "all", "nemotron", "granite", "latent"])
@pytest.mark.parametrize(("batch", "length"), [(1, 40), (2, 96)])
def test_flops_are_those_of_a_sliced_step(batch: int, length: int, feature: str) -> None:
    """Exact: forward, and a whole step as three forwards plus the scores that the scan's backward makes again."""
    arch, function = parts(feature)
    space, layout, rng = space_of(arch), ParamLayout(arch, ffn_groups=FFN_GROUPS), random.Random(length)
    model = build_elastic_model({**vars(arch), **function}, ffn_groups=FFN_GROUPS)
    ids = torch.zeros(batch, length, dtype=torch.long)
    subnets = [random_subnet(space, rng, per_layer=i % 2 == 0) for i in range(10)]
    subnets += [space.full_subnet(), *(space.subnet(layers=(i,)) for i in (0, 1, 3))]
    for subnet in subnets:
        chunk = scan_chunk_length(length, subnet.mamba_head_dim, arch.mamba_state_dim)
        expected = batch * flops(layout, subnet, sequence_length=length, chunk_size=chunk)
        with sdpa_kernel(SDPBackend.MATH):  # torch's counter does not know the fused CPU kernel
            with FlopCounterMode(display=False) as forward:
                logits = model(ids, None, None, elastic=hard_plan(layout, subnet))
            assert forward.get_total_flops() == expected
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_flops}) as backward:
                logits.sum().backward()
        mamba = sum(arch.hybrid_override_pattern[i] == "M" for i in subnet.layers)
        steps = -(-length // min(chunk, length)) * min(chunk, length)
        again = 2 * batch * steps * min(chunk, length) * arch.mamba_num_groups * arch.mamba_state_dim
        assert backward.get_total_flops() == 2 * expected + mamba * again


def test_flops_of_a_layer_of_the_parent() -> None:
    """12B at 8k tokens and tiles of 128: projections dominate, against numbers worked out by hand."""
    layout, s = ParamLayout(NANO_12B), 8192
    mlp = layer_flops(layout, "-", {}, sequence_length=s)
    assert mlp == 2 * s * 2 * 5120 * 20480
    attention = layer_flops(layout, "*", {}, sequence_length=s)
    assert attention == 2 * s * (5120 * 7168 + 5120 * 5120) + 4 * s * s * 5120
    mamba = layer_flops(layout, "M", {}, sequence_length=s)
    assert mamba == 2 * s * (5120 * 22656 + 10240 * 5120 + 128 * 1024 + 128 * 10240 + 2 * 10240 * 128)


def test_expected_sizes_give_the_integer_cost_and_its_slope() -> None:
    """The expected cost of independent choices is the cost at the expected sizes (multilinear)."""
    layout = ParamLayout(architecture(), ffn_groups=FFN_GROUPS)
    generator = torch.Generator().manual_seed(0)
    choices = {"hidden_size": (48, 36, 20), "mamba_num_heads": (12, 8, 4), "mamba_head_dim": (8, 6, 3)}
    p = {n: torch.rand(3, generator=generator, dtype=torch.float64).softmax(0) for n in choices}
    expected = 0.0
    for i, h in enumerate(choices["hidden_size"]):
        for j, m in enumerate(choices["mamba_num_heads"]):
            for k, d in enumerate(choices["mamba_head_dim"]):
                weight = p["hidden_size"][i] * p["mamba_num_heads"][j] * p["mamba_head_dim"][k]
                sizes = {"hidden_size": h, "mamba_num_heads": m, "mamba_head_dim": d}
                expected += weight * layer_parameters(layout, "M", sizes)
    mean = {n: (p[n] * torch.tensor(choices[n], dtype=torch.float64)).sum() for n in choices}
    assert layer_parameters(layout, "M", mean).item() == pytest.approx(expected.item(), rel=1e-12)
