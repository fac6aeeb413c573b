"""Stage 1: kernels alone, forward and backward, against the same computation in fp64 on the CPU.

Ours are plain torch on the device; the others are mamba-ssm's and causal-conv1d's, and ours where these are not there.
Shapes: tiny, a layer of the 12B parent, and one of its child of 15 heads a rank at TP 8. Limits are relative L2.
"""

from collections.abc import Callable, Mapping

import torch
from registry import Found, Machine, check, difference
from torch import Tensor

SHAPES = {  # heads, head_dim, groups, state on a rank
    "tiny": (4, 16, 2, 16),
    "12b": (128, 80, 8, 128),
    "12b child at TP 8": (15, 80, 1, 128),
}
LENGTH, TINY_LENGTH = 384, 40
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
TRITON_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # its products may run in TF32
UNALIGNED_CHANNELS = 13 * 7


def shapes(machine: Machine) -> dict[str, tuple[int, int, int, int]]:
    return {"tiny": SHAPES["tiny"]} if machine.tiny else SHAPES


def scan_inputs(shape: tuple[int, int, int, int], length: int) -> dict[str, Tensor]:
    """Arguments of a scan, fp64 on the CPU, with a D per channel and Mamba's ranges of steps and decays."""
    heads, head_dim, groups, state = shape
    g = torch.Generator().manual_seed(heads + length)
    draw = {"generator": g, "dtype": torch.float64}
    return {
        "x": torch.randn(1, length, heads, head_dim, **draw),
        "dt": 0.5 * torch.randn(1, length, heads, **draw),
        "A": -torch.exp(torch.rand(heads, **draw)),
        "B": torch.randn(1, length, groups, state, **draw) / state**0.5,
        "C": torch.randn(1, length, groups, state, **draw),
        "D": torch.randn(heads, head_dim, **draw),
        "z": torch.randn(1, length, heads, head_dim, **draw),
        "dt_bias": torch.randn(heads, **draw) - 2,
    }


def outcome(run: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`y` and the gradients of all inputs under a fixed random cotangent."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = run(**leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y.backward(cotangent.to(y.device, y.dtype))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def compared(
    machine: Machine,
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    limits: Mapping[torch.dtype, float],
    keep: tuple[str, ...] = (),
) -> dict[str, float]:
    """Largest difference per dtype; what is in `keep` stays fp32 in bf16 too. The reference sees the rounded inputs.

    Raises:
        AssertionError: one above its limit.
    """
    worst = {}
    for dtype, limit in limits.items():
        cast = {n: v.to(torch.float32 if n in keep else dtype) for n, v in inputs.items()}
        expected = outcome(reference, {n: v.double() for n, v in cast.items()})
        found = outcome(run, {n: v.to(machine.device) for n, v in cast.items()})
        differences = {name: difference(found[name], value) for name, value in expected.items()}
        name = max(differences, key=differences.__getitem__)
        assert differences[name] < limit, f"{dtype}: {name} differs by {differences[name]:.2e}, limit {limit:g}"
        worst[str(dtype).removeprefix("torch.")] = differences[name]
    return worst


def largest(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`{case: {dtype: value}}` -> the largest per dtype."""
    return {dtype: max(values[dtype] for values in found.values()) for dtype in next(iter(found.values()))}


def scans(
    machine: Machine, scan: Callable[..., Tensor], limits: Mapping[torch.dtype, float]
) -> dict[str, dict[str, float]]:
    """Differences of a scan for every shape, with `z` and without (mamba-ssm before 2.3 has dD wrong without)."""
    from nemo_elastic.mcore.kernels.ssd import mamba_chunk_scan_combined as ours

    found = {}
    for name, shape in shapes(machine).items():
        for gated in (True, False):
            inputs = scan_inputs(shape, TINY_LENGTH if machine.tiny else LENGTH)
            inputs = inputs if gated else {n: v for n, v in inputs.items() if n != "z"}

            def run(of: Callable[..., Tensor] = scan, **given: Tensor) -> Tensor:
                main = {n: given.pop(n) for n in ("x", "dt", "A", "B", "C")}
                return of(*main.values(), chunk_size=128, dt_softplus=True, **given)

            def reference(**given: Tensor) -> Tensor:
                return run(ours, **given)

            found[f"{name}, {'z' if gated else 'no z'}"] = compared(
                machine, run, reference, inputs, limits, keep=("A", "D", "dt_bias")
            )
    return found


@check(stage=1, seconds=40, predicted={"float32": (None, 2e-6), "bfloat16": (None, 1e-2)})
def scan_torch(machine: Machine) -> Found:
    """Our scan, forward and backward"""
    from nemo_elastic.mcore.kernels.ssd import mamba_chunk_scan_combined

    return Found(largest(scans(machine, mamba_chunk_scan_combined, LIMIT)))


@check(stage=1, seconds=60, needs_kernels=True, predicted={"float32": (None, 5e-4), "bfloat16": (None, 1e-2)})
def scan_triton(machine: Machine) -> Found:
    """mamba-ssm's scan in Triton, with z and without (its dD)"""
    real = None
    if machine.is_cuda:
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as real
        except ImportError:
            real = None
    from nemo_elastic.mcore.kernels.ssd import mamba_chunk_scan_combined as ours

    return Found(largest(scans(machine, real or ours, TRITON_LIMIT if real else LIMIT)), stand_in=real is None)


def convolutions(machine: Machine, convolve: Callable[..., Tensor]) -> dict[str, dict[str, float]]:
    """Differences of a causal convolution for the channels of every shape."""
    from nemo_elastic.mcore.kernels.causal_conv import causal_conv1d_fn as ours

    found = {}
    for name, (heads, head_dim, groups, state) in shapes(machine).items():
        channels, g = heads * head_dim + 2 * groups * state, torch.Generator().manual_seed(heads)
        draw = {"generator": g, "dtype": torch.float64}
        inputs = {
            "x": torch.randn(1, channels, TINY_LENGTH if machine.tiny else LENGTH, **draw),
            "weight": torch.randn(channels, 4, **draw) / 2,
            "bias": torch.randn(channels, **draw),
        }

        def run(of: Callable[..., Tensor] = convolve, **given: Tensor) -> Tensor:
            return of(given["x"], given["weight"], given["bias"], activation="silu")

        def reference(**given: Tensor) -> Tensor:
            return run(ours, **given)

        found[name] = compared(machine, run, reference, inputs, LIMIT)
    return found


@check(stage=1, seconds=20, predicted={"float32": (None, 1e-6), "bfloat16": (None, 1e-2)})
def conv_torch(machine: Machine) -> Found:
    """Our causal convolution, forward and backward"""
    from nemo_elastic.mcore.kernels.causal_conv import causal_conv1d_fn

    return Found(largest(convolutions(machine, causal_conv1d_fn)))


@check(stage=1, seconds=30, needs_kernels=True, predicted={"float32": (None, 2e-6), "bfloat16": (None, 1e-2)})
def conv_cuda(machine: Machine) -> Found:
    """causal-conv1d's kernel, and that it refuses channels that are no multiple of 8"""
    real = None
    if machine.is_cuda:
        try:
            from causal_conv1d import causal_conv1d_fn as real
        except ImportError:
            real = None
    from nemo_elastic.mcore.kernels.causal_conv import causal_conv1d_fn as ours

    found: dict[str, object] = dict(largest(convolutions(machine, real or ours)))
    x = torch.randn(1, 16, UNALIGNED_CHANNELS, device=machine.device).transpose(1, 2)  # as the projection leaves it
    weight = torch.randn(UNALIGNED_CHANNELS, 4, device=machine.device)
    try:
        (real or ours)(x, weight, None, activation="silu")
        found["refuses_unaligned_channels"] = False
    except RuntimeError:
        found["refuses_unaligned_channels"] = True
    return Found(found, stand_in=real is None)


@check(stage=1, seconds=30, predicted={"float32": (None, 2e-5), "bfloat16": (None, 1e-2)})
def kd_fused(machine: Machine) -> Found:
    """Output layer and distillation loss in chunks"""
    from nemo_elastic.config.sections import DistillConfig
    from nemo_elastic.distill.fused import fused_kd_loss

    tokens, hidden, vocab = (24, 16, 96) if machine.tiny else (192, 256, 8192)
    g = torch.Generator().manual_seed(0)
    draw = {"generator": g, "dtype": torch.float64}
    inputs = {"hidden": torch.randn(tokens, hidden, **draw), "weight": torch.randn(vocab, hidden, **draw) / hidden**0.5}
    teacher = torch.randn(tokens, hidden, **draw), torch.randn(vocab, hidden, **draw) / hidden**0.5
    config = DistillConfig(chunk_tokens=7 if machine.tiny else 64)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        theirs = (t.to(hidden.device, hidden.dtype) for t in teacher)
        return fused_kd_loss(hidden, weight, *theirs, config).total

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        own, theirs = (
            torch.log_softmax(h.double() @ w.double().t(), -1) for h, w in ((hidden, weight), rounded(teacher))
        )
        return (theirs.exp() * (theirs - own)).sum()

    def rounded(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t in pair)

    found = {}
    for dtype, limit in {torch.float32: 1e-4, torch.bfloat16: 3e-2}.items():
        found |= compared(machine, run, reference, inputs, {dtype: limit})
    return Found(found)
