"""Time of the pure-PyTorch Mamba-2 mixer against transformers' torch path, and of the scan against a plain matmul.

    python benchmarks/ssd.py [--quick] [--device cuda] [--chunks] [--repetitions N] [--threads N] [--output FILE]

Both mixers have the same sizes and weights and run forward and backward in the same process, one after the other in
every repetition: ours is ``in_proj`` + `mamba_split_conv1d_scan_combined` + norm + ``out_proj``, theirs is
``Mamba2Mixer.torch_forward`` (its norm is over all channels at once, so ours is told to do the same here). The scan
alone is set against one batched matmul with the FLOPs that the scan's own products have. Wall and CPU time of each are
printed as JSON, median and minimum over the repetitions. `--chunks` times the scan at several chunk lengths instead
(how `scan_chunk_length` was chosen).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import finish, interleaved, least, median, parser, start, timer

from nemo_elastic.kinds.scan_chunk import scan_chunk_length
from nemo_elastic.mcore.kernels.chunk_scan import chunk_scan
from nemo_elastic.mcore.kernels.gated_norm import gated_rms_norm
from nemo_elastic.mcore.kernels.ssd import mamba_split_conv1d_scan_combined

REQUIRED_TIME_RATIO = 0.06

FULL = [
    {"seq": 512, "batch": 2, "hidden": 256, "heads": 16, "head_dim": 32, "groups": 4, "state": 64, "chunk_size": 128},
    {"seq": 512, "batch": 1, "hidden": 512, "heads": 16, "head_dim": 64, "groups": 8, "state": 128, "chunk_size": 256},
    {"seq": 2048, "batch": 1, "hidden": 256, "heads": 16, "head_dim": 32, "groups": 4, "state": 64, "chunk_size": 128},
    {"seq": 2048, "batch": 1, "hidden": 256, "heads": 8, "head_dim": 64, "groups": 8, "state": 128, "chunk_size": 256},
]
QUICK = [
    {"seq": 100, "batch": 1, "hidden": 64, "heads": 8, "head_dim": 16, "groups": 2, "state": 16, "chunk_size": 64},
]
CONV_KERNEL = 4


def mixers(case: dict) -> tuple[Callable[[], None], Callable[[], None], float]:
    """Runs of our mixer and of theirs on the same weights, and the relative difference (L2) of their outputs."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    width = case["heads"] * case["head_dim"]
    config = Mamba2Config(
        hidden_size=case["hidden"],
        expand=width / case["hidden"],
        num_heads=case["heads"],
        head_dim=case["head_dim"],
        n_groups=case["groups"],
        state_size=case["state"],
        conv_kernel=CONV_KERNEL,
        chunk_size=case["chunk_size"],
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    with torch.no_grad():  # Mamba's own initial ranges: steps from 1e-3 to 0.1, decays from 1 to 16
        step = torch.exp(torch.empty(case["heads"]).uniform_(-6.9, -2.3))
        theirs.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        theirs.A_log.copy_(torch.empty(case["heads"]).uniform_(1, 16).log())
    hidden = torch.randn(case["batch"], case["seq"], case["hidden"], requires_grad=True)
    grad = torch.randn(case["batch"], case["seq"], case["hidden"])

    def forward_ours() -> torch.Tensor:
        y = mamba_split_conv1d_scan_combined(
            F.linear(hidden, theirs.in_proj.weight),
            theirs.conv1d.weight.squeeze(1),
            theirs.conv1d.bias,
            theirs.dt_bias,
            -torch.exp(theirs.A_log),
            theirs.D,
            case["chunk_size"],
            headdim=case["head_dim"],
            ngroups=case["groups"],
        )
        y = gated_rms_norm(y, theirs.norm.weight, eps=theirs.norm.variance_epsilon)
        return F.linear(y, theirs.out_proj.weight)

    def run(forward: Callable[[], torch.Tensor]) -> None:
        theirs.zero_grad(set_to_none=True)
        hidden.grad = None
        forward().backward(grad)

    with torch.no_grad():
        reference = theirs.torch_forward(hidden)
        difference = (forward_ours() - reference).norm() / reference.norm()
    return lambda: run(forward_ours), lambda: run(lambda: theirs.torch_forward(hidden)), difference.item()


def scan_run(case: dict, chunk: int) -> Callable[[], None]:
    b, s, h, p, g, n = (case[k] for k in ("batch", "seq", "heads", "head_dim", "groups", "state"))
    x, dt, B, C = torch.randn(b, s, h, p), torch.rand(b, s, h), torch.randn(b, s, g, n), torch.randn(b, s, g, n)
    arguments = [x, dt, -torch.rand(b, s, h), B, C, torch.randn(h, 1)]
    arguments = [t.requires_grad_() for t in arguments]
    start, grad = torch.zeros(b, h, p, n), torch.randn_like(x)

    def run() -> None:
        y, _ = chunk_scan(*arguments, start, chunk)
        torch.autograd.grad(y, arguments, grad)

    return run


def scan_flops(case: dict, chunk: int) -> int:
    """FLOPs of the scan's matrix products, forward and backward (chunks are padded to full length)."""
    b, s, h, p, g, n = (case[k] for k in ("batch", "seq", "heads", "head_dim", "groups", "state"))
    steps = b * -(-s // chunk) * chunk
    inside, states, scores = chunk * h * p, h * p * n, chunk * g * n
    return 2 * steps * (3 * inside + 6 * states + 4 * scores)


def matmul_run(flops: int) -> Callable[[], None]:
    """A batched product of 512 x 512 matrices with (nearly) ``flops`` FLOPs."""
    size = 512 if flops > 2 * 512**3 else 64
    batch = max(1, round(flops / (2 * size**3)))
    left, right = torch.randn(batch, size, size), torch.randn(batch, size, size)
    out = torch.empty_like(left)
    scale = flops / (2 * batch * size**3)
    if not 0.5 < scale < 2:
        raise ValueError(f"case too small for a matmul of {flops} FLOPs")
    return lambda: torch.bmm(left, right, out=out)


def statistics_of(found: list) -> dict[str, float]:
    """Median and minimum of wall and CPU seconds."""
    middle, best = median(found), least(found)
    return {"s": middle.wall, "min_s": best.wall, "cpu_s": middle.cpu, "cpu_min_s": best.cpu}


def measure(case: dict, repetitions: int) -> dict:
    ours, theirs, difference = mixers(case)
    chunk = scan_chunk_length(case["seq"], case["head_dim"], case["state"])
    flops = scan_flops(case, chunk)
    runs = {"ours": ours, "transformers": theirs, "scan": scan_run(case, chunk), "matmul": matmul_run(flops)}
    times = {
        name: statistics_of(found)
        for name, found in interleaved(runs, repetitions, measure=timer(torch.get_default_device())).items()
    }
    result = dict(case) | {"scan_chunk_length": chunk, "scan_gflop": flops / 1e9, "relative_difference": difference}
    result |= {f"{name}_{key}": value for name, entry in times.items() for key, value in entry.items()}
    for key in ("s", "min_s", "cpu_s", "cpu_min_s"):
        result[f"time_ratio_{key}"] = times["ours"][key] / times["transformers"][key]
        result[f"scan_to_matmul_ratio_{key}"] = times["scan"][key] / times["matmul"][key]
    result["time_ratio"] = result["time_ratio_s"]
    result["scan_to_matmul_ratio"] = result["scan_to_matmul_ratio_s"]
    return result


def measure_chunks(case: dict, repetitions: int) -> dict:
    chunks = [q for q in (16, 32, 64, 128, 256) if q <= case["seq"]]
    measure = timer(torch.get_default_device())
    times = interleaved({str(q): scan_run(case, q) for q in chunks}, repetitions, measure=measure)
    chosen = scan_chunk_length(case["seq"], case["head_dim"], case["state"])
    return dict(case) | {"chosen": chosen, "cpu_min_s": {q: least(found).cpu for q, found in times.items()}}


def main() -> int:
    words = parser(__doc__, quick="one tiny case, a few seconds", repetitions=5, device=True)
    words.add_argument("--chunks", action="store_true", help="time the scan at several chunk lengths")
    arguments = start(words)
    torch.manual_seed(0)
    torch.set_default_device(arguments.device)
    one = measure_chunks if arguments.chunks else measure
    cases = [one(case, arguments.repetitions) for case in (QUICK if arguments.quick else FULL)]
    result: dict = {"seed": 0, "dtype": "float32", "cases": cases, "required_time_ratio": REQUIRED_TIME_RATIO}
    if not arguments.chunks and not arguments.quick:  # the requirement is for real lengths
        result["met"] = all(case["time_ratio"] <= REQUIRED_TIME_RATIO for case in cases)
    return finish(arguments, result)


if __name__ == "__main__":
    raise SystemExit(main())
