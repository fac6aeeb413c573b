"""The pure-PyTorch Mamba-2 kernels against recurrences, loops and formulas written here, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nemo_elastic.mcore.kernels import ssd
from nemo_elastic.mcore.kernels.chunk_scan import chunk_scan

TOLERANCE = 1e-10


def sequential_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_limit):
    """One step after the other, one head after the other: the definition, with nothing shared or reordered."""
    heads, groups = x.shape[2], B.shape[2]
    outputs, finals = [], []
    for head in range(heads):
        group = head // (heads // groups)
        state = initial_states[:, head]
        steps = []
        for t in range(x.shape[1]):
            step = torch.log1p(torch.exp(dt[:, t, head] + dt_bias[head])).clamp(*dt_limit)
            inflow = torch.einsum("b,bp,bn->bpn", step, x[:, t, head], B[:, t, group])
            state = torch.exp(step * A[head])[:, None, None] * state + inflow
            read = torch.einsum("bpn,bn->bp", state, C[:, t, group]) + D[head] * x[:, t, head]
            gate = z[:, t, head]
            steps.append(read * gate / (1 + torch.exp(-gate)))
        outputs.append(torch.stack(steps, 1))
        finals.append(state)
    return torch.stack(outputs, 2), torch.stack(finals, 1)


def scan_inputs(length, *, batch=2, heads=4, head_dim=3, groups=2, state=5, head_d=False, seed=0):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads),
        "A": (-4 * torch.rand(heads, generator=make, dtype=torch.float64)).requires_grad_(),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads, head_dim) if head_d else normal(heads),
        "z": normal(batch, length, heads, head_dim),
        "dt_bias": normal(heads),
        "initial_states": normal(batch, heads, head_dim, state),
    }


def gradients(outputs, inputs, seed=1):
    make = torch.Generator().manual_seed(seed)
    loss = sum((y * torch.randn(y.shape, generator=make, dtype=torch.float64)).sum() for y in outputs)
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@pytest.mark.parametrize(
    ("length", "heads", "groups", "head_d"),
    [(1, 4, 2, False), (7, 4, 1, True), (37, 4, 2, False), (64, 3, 3, False), (131, 4, 4, True)],
)
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.4, 1.1)])
def test_scan_and_all_gradients_equal_the_recurrence(length, heads, groups, head_d, dt_limit):
    inputs = scan_inputs(length, heads=heads, groups=groups, head_d=head_d)
    expected = sequential_scan(**inputs, dt_limit=dt_limit)
    found = ssd.mamba_chunk_scan_combined(
        *(inputs[k] for k in ("x", "dt", "A", "B", "C")),
        16,
        **{k: inputs[k] for k in ("D", "z", "dt_bias", "initial_states")},
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    for y, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(y, reference, rtol=TOLERANCE, atol=TOLERANCE)
    found_gradients, expected_gradients = gradients(found, inputs), gradients(expected, inputs)
    for name, reference in expected_gradients.items():
        torch.testing.assert_close(
            found_gradients[name],
            reference,
            rtol=TOLERANCE,
            atol=TOLERANCE,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )


@pytest.mark.parametrize("chunk", [1, 5, 8, 29, 64])
def test_result_does_not_depend_on_the_chunk_length(chunk):
    inputs = scan_inputs(29)
    core = {k: inputs[k] for k in ("x", "dt", "B", "C", "D", "initial_states")}
    core["a"] = -inputs["dt"].detach().abs().requires_grad_()

    def run(q):
        rest = (core["B"], core["C"], core["D"].unsqueeze(-1), core["initial_states"])
        return chunk_scan(core["x"], core["dt"], core["a"], *rest, q)

    for y, reference in zip(run(chunk), run(3), strict=True):
        torch.testing.assert_close(y, reference, rtol=TOLERANCE, atol=TOLERANCE)
    found, expected = gradients(run(chunk), core), gradients(run(3), core)
    for name in core:
        torch.testing.assert_close(found[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_one_output_alone_carries_gradients():
    inputs = scan_inputs(19)
    call = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    y, final = ssd.mamba_chunk_scan_combined(*call, 8, dt_softplus=True, return_final_states=True)
    zero = {"D": 0, "z": 0}
    plain = {
        k: torch.zeros_like(v) if k in ("D", "dt_bias", "initial_states") else v
        for k, v in inputs.items()
        if k not in zero
    }
    reference = sequential_scan(
        **plain, D=torch.zeros(4, dtype=torch.float64), z=torch.full_like(inputs["x"], 50.0), dt_limit=(0.0, math.inf)
    )
    for found, expected in ((final, reference[1]), (y, reference[0] / 50.0)):
        names = ["x", "dt", "A", "B"]
        a = torch.autograd.grad(found.square().sum(), [inputs[k] for k in names], retain_graph=True)
        b = torch.autograd.grad(expected.square().sum(), [inputs[k] for k in names], retain_graph=True)
        for name, left, right in zip(names, a, b, strict=True):
            torch.testing.assert_close(left, right, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_strong_decay_stays_finite_and_exact_in_fp32():
    """Log decays of -60 a step: factored exponentials would overflow, differences of them would cancel."""
    inputs = {k: v.detach() for k, v in scan_inputs(200, heads=4, groups=2).items()}
    inputs["A"] = torch.tensor([-60.0, -16.0, -1.0, -0.001], dtype=torch.float64)
    names = ["x", "dt", "A", "B", "C"]
    results = {}
    for dtype in (torch.float64, torch.float32):
        call = [inputs[k].to(dtype).requires_grad_() for k in names]
        y = ssd.mamba_chunk_scan_combined(*call, 64, dt_softplus=True)
        results[dtype] = [y.detach(), *torch.autograd.grad(y.square().sum(), call)]
    for name, exact, found in zip(["y", *names], results[torch.float64], results[torch.float32], strict=True):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < 3e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kernel", [None, "of mamba-ssm"])
def test_tokens_one_by_one_equal_the_scan(kernel, monkeypatch):
    """Also as mamba-ssm's kernel is called, with the numbers of every channel: here ours stands in for it."""
    shapes = []

    def stand_in(state, x, dt, A, B, C, **more):
        shapes.append((dt.shape == x.shape, A.shape == state.shape[1:], A.stride()[1:], dt.stride(-1)))
        return ssd.selective_state_update(state, x, dt, A, B, C, **more)

    if kernel:
        monkeypatch.setattr(ssd, "step_kernel", lambda device_type: stand_in)
    inputs = {k: v.detach() for k, v in scan_inputs(23).items()}
    whole, final = ssd.mamba_chunk_scan_combined(
        *(inputs[k] for k in ("x", "dt", "A", "B", "C")),
        8,
        **{k: inputs[k] for k in ("D", "z", "dt_bias", "initial_states")},
        dt_softplus=True,
        return_final_states=True,
    )
    state = inputs["initial_states"].clone()
    per_token = ("x", "dt", "B", "C", "z")
    fixed = {k: inputs[k] for k in ("A", "D", "dt_bias")}
    steps = [ssd.mamba_step(state, **{k: inputs[k][:, t] for k in per_token}, **fixed) for t in range(23)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(state, final, rtol=TOLERANCE, atol=TOLERANCE)
    assert shapes == ([(True, True, (0, 0), 0)] * 23 if kernel else [])  # strides of 0: one number a head


def naive_conv(x, weight, bias, history, silu):
    rows = []
    for t in range(x.shape[2]):
        total = bias.clone().expand(x.shape[0], -1)
        for k in range(weight.shape[1]):
            source = t - (weight.shape[1] - 1) + k
            tap = x[:, :, source] if source >= 0 else history[:, :, source]
            total = total + weight[:, k] * tap
        rows.append(total / (1 + torch.exp(-total)) if silu else total)
    return torch.stack(rows, 2)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("silu", [True, False])
def test_conv_equals_a_loop(length, silu):
    torch.manual_seed(0)
    shapes = {"x": (2, 6, length), "weight": (6, 4), "bias": (6,), "initial_states": (2, 6, 3)}
    inputs = {k: torch.randn(shape, dtype=torch.float64, requires_grad=True) for k, shape in shapes.items()}
    room = torch.empty(2, 6, 3, dtype=torch.float64)
    y, last = ssd.causal_conv1d_fn(
        **inputs, return_final_states=True, final_states_out=room, activation="silu" if silu else None
    )
    expected = naive_conv(*inputs.values(), silu)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(last, torch.cat([inputs["initial_states"], inputs["x"]], 2)[:, :, -3:])
    assert last is room
    found, reference = gradients([y], inputs), gradients([expected], inputs)
    for name in inputs:
        torch.testing.assert_close(found[name], reference[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_conv_token_by_token_equals_the_whole():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 6, 9), (6, 4), (6,)))
    whole = ssd.causal_conv1d_fn(x, weight, bias, activation="silu")
    state = torch.zeros(2, 6, 4, dtype=torch.float64)
    steps = [ssd.causal_conv1d_update(x[:, :, t], state, weight, bias, "silu") for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 2), whole, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_norm_per_group(norm_before_gate, gated):
    torch.manual_seed(0)
    norm = ssd.RMSNormGated(12, eps=1e-3, group_size=4, norm_before_gate=norm_before_gate, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 5, 3, 12, dtype=torch.float64).unbind(2)[:2]
    gate = z / (1 + torch.exp(-z)) if gated else torch.ones_like(z)
    parts = []
    for start in range(0, 12, 4):
        part = slice(start, start + 4)
        u = x[..., part] if norm_before_gate else x[..., part] * gate[..., part]
        u = u / ((u**2).sum(-1, keepdim=True) / 4 + 1e-3) ** 0.5 * norm.weight[part]
        parts.append(u * gate[..., part] if norm_before_gate else u)
    found = norm(x, z if gated else None)
    torch.testing.assert_close(found, torch.cat(parts, -1), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_output", [True, False])
def test_split_conv_scan_equals_its_parts(with_norm, with_output):
    torch.manual_seed(0)
    heads, head_dim, groups, state, length = 4, 3, 2, 5, 21
    width, states = heads * head_dim, groups * state

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    packed = normal(2, length, 2 * width + 2 * states + heads)
    weight, bias, dt_bias, A, D = (
        normal(width + 2 * states, 4),
        normal(width + 2 * states),
        normal(4),
        -normal(4).abs(),
        normal(4),
    )
    start, norm_weight, out_weight, out_bias = normal(2, 4, 3, 5), normal(width), normal(7, width), normal(7)
    found, found_final = ssd.mamba_split_conv1d_scan_combined(
        packed, weight, bias, dt_bias, A, D, 16, initial_states=start, return_final_states=True, headdim=head_dim,
        ngroups=groups, norm_before_gate=False, rmsnorm_weight=norm_weight if with_norm else None, rmsnorm_eps=1e-5,
        outproj_weight=out_weight if with_output else None, outproj_bias=out_bias if with_output else None,
    )  # fmt: skip
    z, middle, dt = packed.split([width, width + 2 * states, heads], -1)
    middle = naive_conv(middle.transpose(1, 2), weight, bias, torch.zeros(2, width + 2 * states, 3).double(), True)
    x, B, C = middle.transpose(1, 2).split([width, states, states], -1)
    x, B, C = x.reshape(2, length, heads, -1), B.reshape(2, length, groups, -1), C.reshape(2, length, groups, -1)
    open_gate = torch.full_like(x, 40.0)  # silu(40) = 40 in fp64
    y, final = sequential_scan(x, dt, A, B, C, D, open_gate, dt_bias, start, (0.0, math.inf))
    y = y.reshape(2, length, width) / 40.0 * F.silu(z)
    if with_norm:
        grouped = y.reshape(2, length, groups, -1)
        y = (grouped / ((grouped**2).mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(2, length, width) * norm_weight
    if with_output:
        y = y @ out_weight.T + out_bias
    torch.testing.assert_close(found, y, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found_final, final, rtol=TOLERANCE, atol=TOLERANCE)


def test_bf16_is_computed_in_fp32():
    inputs = {k: v.detach().bfloat16() for k, v in scan_inputs(50).items()}
    call = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    y, final = ssd.mamba_chunk_scan_combined(*call, 8, D=inputs["D"], dt_softplus=True, return_final_states=True)
    exact = ssd.mamba_chunk_scan_combined(*(t.double() for t in call), 8, D=inputs["D"].double(), dt_softplus=True)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    # One rounding to 8 significant bits at the end and nothing else: at most 2^-8 relative.
    torch.testing.assert_close(y.double(), exact, rtol=2**-7.99, atol=1e-5)


@pytest.mark.parametrize("argument", ["seq_idx", "cu_seqlens", "return_varlen_states"])
def test_unsupported_arguments_are_refused(argument):
    inputs = {k: v.detach() for k, v in scan_inputs(4).items()}
    call = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    value = True if argument == "return_varlen_states" else torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=argument):
        ssd.mamba_chunk_scan_combined(*call, 8, **{argument: value})


def test_bad_shapes_are_refused():
    inputs = {k: v.detach() for k, v in scan_inputs(4, heads=4, groups=2).items()}
    x, dt, A, B, C = (inputs[k] for k in ("x", "dt", "A", "B", "C"))
    with pytest.raises(ValueError, match="multiple"):
        ssd.mamba_chunk_scan_combined(x[:, :, :3], dt[:, :, :3], A[:3], B, C, 8)
    with pytest.raises(ValueError, match="do not fit"):
        ssd.mamba_chunk_scan_combined(x, dt[:, :3], A, B, C, 8)
    with pytest.raises(ValueError, match="chunk_size"):
        ssd.mamba_chunk_scan_combined(x, dt, A, B, C, 0)
    with pytest.raises(ValueError, match="seq_idx"):
        ssd.causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4), seq_idx=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="activation"):
        ssd.causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4), activation="gelu")
    with pytest.raises(ValueError, match="group_size"):
        ssd.RMSNormGated(10, group_size=4)
    with pytest.raises(ValueError, match="headdim"):
        ssd.mamba_split_conv1d_scan_combined(torch.zeros(1, 2, 9), torch.zeros(5, 4), None, A[:1], A[:1], A[:1], 8)
