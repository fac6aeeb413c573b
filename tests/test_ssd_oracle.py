"""The pure-PyTorch kernels against mamba-ssm's own Triton kernels, run by Triton's interpreter on a CPU.

Needs a Python that has torch, einops, triton and mamba-ssm (built with MAMBA_FORCE_BUILD=TRUE and
MAMBA_SKIP_CUDA_BUILD=TRUE, installed with --no-build-isolation --no-deps); name it in NEMO_ELASTIC_ORACLE_PYTHON. The
comparison is in fp32: Triton's kernels compute in it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from nemo_elastic.mcore.kernels import ssd

ORACLE = os.environ.get("NEMO_ELASTIC_ORACLE_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ORACLE, reason="NEMO_ELASTIC_ORACLE_PYTHON does not name a Python with mamba-ssm and triton installed"
    ),
]

SCAN_SIZES = {  # batch, length, heads, head dim, groups, state, chunk size
    "scan_one_group": (1, 32, 4, 16, 1, 16, 16),
    "scan_two_groups": (2, 48, 4, 16, 2, 16, 16),
    "scan_odd_length": (1, 41, 4, 16, 2, 16, 16),
}


def scan_case(batch, length, heads, head_dim, groups, state, chunk_size):
    inputs = {
        "x": torch.randn(batch, length, heads, head_dim),
        "dt": torch.randn(batch, length, heads),
        "A": -4 * torch.rand(heads) - 0.5,
        "B": torch.randn(batch, length, groups, state),
        "C": torch.randn(batch, length, groups, state),
        "D": torch.randn(heads),
        "z": torch.randn(batch, length, heads, head_dim),
        "dt_bias": 0.1 * torch.randn(heads),
        "initial_states": torch.randn(batch, heads, head_dim, state),
    }
    grad_y, grad_final = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_states"])
    return {"kind": "scan", "args": (inputs, chunk_size, grad_y, grad_final), "kwargs": {}}


def norm_case(norm_before_gate):
    x, z, weight = torch.randn(3, 7, 64), torch.randn(3, 7, 64), torch.randn(64)
    options = {"eps": 1e-5, "group_size": 16, "norm_before_gate": norm_before_gate}
    return {"kind": "norm", "args": (x, z, weight), "kwargs": options}


def step_case():
    batch, heads, head_dim, groups, state = 2, 4, 16, 2, 16
    x, dt, z = (torch.randn(batch, heads, head_dim) for _ in range(3))
    A = -torch.rand(heads, head_dim, state)
    B, C = torch.randn(batch, groups, state), torch.randn(batch, groups, state)
    D, dt_bias = torch.randn(heads, head_dim), torch.randn(heads, head_dim)
    start = torch.randn(batch, heads, head_dim, state)
    return {
        "kind": "step",
        "args": (start, x, dt, A, B, C, D),
        "kwargs": {"z": z, "dt_bias": dt_bias, "dt_softplus": True},
    }


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    torch.manual_seed(0)
    cases = {name: scan_case(*sizes) for name, sizes in SCAN_SIZES.items()}
    cases |= {"norm_after_gate": norm_case(False), "norm_before_gate": norm_case(True), "step": step_case()}
    folder = tmp_path_factory.mktemp("oracle")
    torch.save(cases, folder / "inputs.pt")
    child = Path(__file__).with_name("mamba_ssm_oracle.py")
    command = [ORACLE, str(child), str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    subprocess.run(command, check=True, timeout=900)
    return cases, torch.load(folder / "outputs.pt")


def relative_errors(found: dict, expected: dict) -> dict[str, float]:
    return {k: ((found[k] - v).norm() / v.norm()).item() for k, v in expected.items()}


@pytest.mark.parametrize("name", SCAN_SIZES)
def test_scan_and_gradients(oracle, name, record_property):
    cases, outputs = oracle
    inputs, chunk_size, grad_y, grad_final = cases[name]["args"]
    inputs = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    y, final = ssd.mamba_chunk_scan_combined(
        *(inputs[k] for k in ("x", "dt", "A", "B", "C")),
        chunk_size,
        **{k: inputs[k] for k in ("D", "z", "dt_bias", "initial_states")},
        dt_softplus=True,
        return_final_states=True,
    )
    ((y * grad_y).sum() + (final * grad_final).sum()).backward()
    found = {"y": y.detach(), "final": final.detach()} | {f"d{k}": v.grad for k, v in inputs.items()}
    errors = relative_errors(found, outputs[name])
    record_property("relative_errors", errors)
    # dA and ddt_bias are sums of many terms of both signs: fp32 leaves about 5e-6 there, 1e-6 and less elsewhere.
    limits = {name: 2e-5 if name in ("dA", "ddt_bias") else 3e-6 for name in errors}
    assert len(errors) == 11 and all(errors[k] < limits[k] for k in errors), errors


@pytest.mark.parametrize("name", ["norm_after_gate", "norm_before_gate"])
def test_gated_norm(oracle, name, record_property):
    cases, outputs = oracle
    x, z, weight = cases[name]["args"]
    norm = ssd.RMSNormGated(64, **cases[name]["kwargs"])
    norm.weight.data.copy_(weight)
    errors = relative_errors({"y": norm(x, z).detach()}, outputs[name])
    record_property("relative_errors", errors)
    assert max(errors.values()) < 1e-6, errors


def test_step(oracle, record_property):
    cases, outputs = oracle
    state, *rest = cases["step"]["args"]
    state = state.clone()
    found = {"y": ssd.selective_state_update(state, *rest, **cases["step"]["kwargs"]), "state": state}
    errors = relative_errors(found, outputs["step"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < 1e-6, errors
