"""The elastic modules on a GPU: real kernels, Transformer Engine's linears where they are installed.

masked == sliced and full == plain, as on a CPU; no forward waits for the device.
"""

from typing import Any

import pytest
import torch
from pool_elastic import elastic_model, gates, layout_of, run_plan, tokens
from small_parent import FFN_GROUPS, architecture, space_of

from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.kernels.layer_specs import have_transformer_engine
from nemo_elastic.mcore.models.build import build_plain_model, load_weights, named_global_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("one_rank"),
]

SIZES = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "mamba_num_groups": 4,
    "mamba_state_dim": 64,
    "vocab_size": 512,
}
CHILD = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "layers": (0, 1, 3, 4, 6, 7),
}
# Transformer Engine's fp32 products are TF32 whatever torch is told; products of cut weights are torch's.
TOLERANCE = {torch.float32: 2e-3 if have_transformer_engine() else 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Any:
    """fp32 matrix products in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before)


def close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    return ((found - expected).norm() / expected.norm()).item() < limit


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_masked_is_sliced(dtype: torch.dtype) -> None:
    arch = architecture(**SIZES)
    model, layout = elastic_model(arch, dtype).cuda(), layout_of(arch)
    ids, subnet = tokens(arch, length=64).cuda(), space_of(arch).subnet(**CHILD)
    found = {}
    for mode in ("masked", "sliced"):
        values = {n: g.detach().cuda().requires_grad_() for n, g in gates(arch, torch.float32).items()}
        logits, gradients = run_plan(model, ids, hard_plan(layout, subnet, mode, values), layout)
        found[mode] = (logits, gradients, {n: v.grad for n, v in values.items()})
    (masked, masked_gradients, masked_gates), (sliced, sliced_gradients, sliced_gates) = found.values()
    assert close(sliced, masked, TOLERANCE[dtype])
    for name, expected in masked_gradients.items():
        if expected.any():
            assert close(sliced_gradients[name], expected, 10 * TOLERANCE[dtype]), name
    if dtype == torch.float32:
        for name, expected in masked_gates.items():
            assert close(sliced_gates[name], expected, 1e-2), name


def test_full_is_plain() -> None:
    """The plain model has Transformer Engine's fused norm and linear where that is installed; ours are apart."""
    arch = architecture(**SIZES)
    plain = build_plain_model(arch, params_dtype=torch.float32).cuda()
    elastic, layout = elastic_model(arch).cuda(), layout_of(arch)
    with torch.no_grad():
        load_weights(plain, dict(named_global_parameters(elastic, layout)), arch, ffn_groups=FFN_GROUPS)
    ids = tokens(arch, length=64).cuda()
    with torch.no_grad():
        expected = plain(ids, None, None)
        for mode in ("masked", "sliced"):
            found = elastic(ids, None, None, elastic=hard_plan(layout, space_of(arch).full_subnet(), mode))
            assert close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine")
def test_linears_are_transformer_engines() -> None:
    model = elastic_model(architecture(**SIZES))
    kinds = {type(m).__name__ for m in model.decoder.modules() if type(m).__name__.endswith("ParallelLinear")}
    assert kinds == {"TEColumnParallelLinear", "TERowParallelLinear"}


@pytest.mark.parametrize("mode", ["masked", "sliced"])
def test_no_forward_waits_for_the_device(mode: str) -> None:
    arch = architecture(**SIZES)
    model, ids = elastic_model(arch).cuda(), tokens(arch, length=64).cuda()
    plan = hard_plan(layout_of(arch), space_of(arch).subnet(**CHILD), mode)
    for _ in range(2):  # kernels are compiled, forward and backward, and masks made once
        model(ids, None, None, elastic=plan).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, None, None, elastic=plan).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
