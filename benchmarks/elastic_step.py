"""What a training step of a subnet costs: sliced and masked, against the extracted child and the whole model.

    python benchmarks/elastic_step.py [--quick] [--device cuda] [--repetitions N] [--threads N] [--budgets 0.75,0.5]
                                      [--output FILE]

Forward and backward of one micro-batch in CPU time of this process, on a GPU (bf16) by events on its stream. All
variants run one after the other in every repetition, the minimum of a variant counts, and ratios are to the plain
model at full size. Every model is wrapped in Megatron's DistributedDataParallel, so all of them add their gradients
to a buffer, as in training. The extracted child is a plain Megatron model of the child's size: its time is what a
sliced step is measured by (limit 1.08).

A budget is met by shrinking every width dim alike; no layer is dropped (that costs nothing in either case). The
optimizer steps all weights of the family whatever ran, so its ratio is the same for every budget; the child's own is
beside it. `expert_step.py` measures a model with experts by the same functions.
`memory`: the most bytes of tensors that live at once during a step, weights and gradient buffers not counted.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from harness import finish, interleaved, least, listed, parser, start, timer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_elastic.cost.counts import flops, parameters
from nemo_elastic.mcore.runtime import cpu
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.dims import dim_groups, present_dims
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

LIMIT_SLICED, LIMIT_FULL = 1.08, 1.03
FFN_GROUPS = 8
FULL = Architecture(
    hybrid_override_pattern="M-M-M*-M-",
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=64,
    mamba_num_heads=24,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=64,
    vocab_size=8192,
)
QUICK = Architecture(
    hybrid_override_pattern="M-*-",
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    mamba_num_heads=16,
    mamba_head_dim=16,
    mamba_num_groups=8,
    mamba_state_dim=16,
    vocab_size=512,
)


def start_megatron() -> None:
    """One process, its own parallel state."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    cpu.install()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # gloo would wait for the GPU in each loss
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def subnet_for(space: ElasticSpace, fraction: float) -> Subnet:
    """The subnet that shrinks every width dim alike and has at most `fraction` of the parent's parameters."""
    arch, layout = space.architecture, ParamLayout(space.architecture, ffn_groups=space.groups)
    steps = dim_groups(arch, space.groups) | {"hidden_size": 16, "ffn_hidden_size": 64, "mamba_head_dim": 4}
    parent = parameters(layout, space.full_subnet())
    for scale in range(1000, 0, -1):
        sizes = {n: max(1, round(scale / 1000 * getattr(arch, n) / steps[n])) * steps[n] for n in present_dims(arch)}
        subnet = space.subnet(**sizes)
        if parameters(layout, subnet) <= fraction * parent:
            return subnet
    raise ValueError(f"no subnet has {fraction} of the parent's parameters")


def child_of(arch: Architecture, subnet: Subnet) -> Architecture:
    fields = {f: getattr(arch, f) for f in arch.__dataclass_fields__}
    widths = {n: getattr(subnet, n) for n in present_dims(arch)}
    return Architecture(**(fields | {n: w[0] if isinstance(w, tuple) else w for n, w in widths.items()}))


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that still live; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._seen:
                    self._seen[key] = weakref.ref(storage, self._forget(key, storage.nbytes()))
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
        return result

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        return gone


class Step:
    """A model in Megatron's DDP and what it is to run: one forward and backward."""

    def __init__(self, model: Any, plan: Any, ids: torch.Tensor) -> None:
        self.model, self.keywords, self.ids = model, {} if plan is None else {"elastic": plan}, ids

    def __call__(self) -> None:
        labels = self.ids.roll(-1, 1)
        self.model(self.ids, None, None, labels=labels, **self.keywords).mean().backward()

    def peak_bytes(self) -> int:
        self.model.zero_grad_buffer()
        gc.collect()
        with PeakBytes() as tracker:
            self()
        return tracker.peak


def wrapped(model: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def optimizer_seconds(models: dict[str, Any], repetitions: int, device: torch.device) -> dict[str, float]:
    """Seconds of an Adam step on every weight of a model, the least of some."""
    optimizers = {}
    for name, model in models.items():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers[name] = torch.optim.AdamW(model.parameters(), lr=0.0)
        optimizers[name].step()
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    times = interleaved(steps, repetitions, warm_up=False, measure=timer(device))
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return {name: least(found).cpu for name, found in times.items()}


def measure(
    arch: Architecture,
    fractions: list[float],
    *,
    halved: Mapping[str, Mapping[str, int]] | None = None,
    length: int,
    repetitions: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    with_optimizer: bool = True,
) -> dict[str, Any]:
    """Every variant in turn; all models are in memory at once, `with_optimizer` their Adam states too.

    Args:
        halved: children by the sizes that differ from the parent's, beside those of `fractions`.
    """
    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model

    space = ElasticSpace(architecture=arch, ffn_groups=FFN_GROUPS)
    layout = ParamLayout(arch, ffn_groups=FFN_GROUPS)
    device = device or torch.device("cpu")
    ids = torch.randint(0, arch.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    full = space.full_subnet()
    subnets: dict[Any, Subnet] = {f: subnet_for(space, f) for f in fractions}
    subnets |= {name: space.subnet(**sizes) for name, sizes in (halved or {}).items()}
    elastic = wrapped(build_elastic_model(arch, ffn_groups=FFN_GROUPS, params_dtype=dtype).to(device))
    plain = wrapped(build_plain_model(arch, params_dtype=dtype).to(device))
    models = {"plain": plain} | {
        f"child {f}": wrapped(build_plain_model(child_of(arch, s), params_dtype=dtype).to(device))
        for f, s in subnets.items()
    }
    steps = {"plain": Step(plain, None, ids), "elastic": Step(elastic, hard_plan(layout, full, "sliced"), ids)}
    for f, subnet in subnets.items():
        steps[f"extracted {f}"] = Step(models[f"child {f}"], None, ids)
        steps[f"sliced {f}"] = Step(elastic, hard_plan(layout, subnet, "sliced"), ids)
        steps[f"masked {f}"] = Step(elastic, hard_plan(layout, subnet, "masked"), ids)
    clear = lambda name: steps[name].model.zero_grad_buffer()  # noqa: E731
    seconds = interleaved(steps, repetitions, before=clear, measure=timer(device))
    least_of = {name: least(found).cpu for name, found in seconds.items()}
    peak = {name: step.peak_bytes() for name, step in steps.items()}
    optimizer = optimizer_seconds({**models, "elastic": elastic}, repetitions, device) if with_optimizer else {}
    whole, whole_flops = least_of["plain"], flops(layout, full, sequence_length=length)
    budgets = []
    for f, subnet in subnets.items():
        time_of, bytes_of = (
            {kind: source[f"{kind} {f}"] for kind in ("sliced", "masked", "extracted")} for source in (least_of, peak)
        )
        budgets.append(
            {
                "budget": f,
                "parameters_ratio": round(parameters(layout, subnet) / parameters(layout, full), 4),
                "flops_ratio": round(flops(layout, subnet, sequence_length=length) / whole_flops, 4),
                **{f"{kind}_time_ratio": round(t / whole, 4) for kind, t in time_of.items()},
                "sliced_over_extracted": round(time_of["sliced"] / time_of["extracted"], 4),
                **{f"{kind}_memory_ratio": round(b / peak["plain"], 4) for kind, b in bytes_of.items()},
                **{
                    key: round(optimizer[name] / optimizer["plain"], 4)
                    for key, name in (
                        ("optimizer_time_ratio", "elastic"),
                        ("extracted_optimizer_time_ratio", f"child {f}"),
                    )
                    if optimizer
                },
                "subnet": subnet.to_dict(),
            }
        )
    return {
        "full": {
            "parameters": parameters(layout, full),
            "tokens": length,
            "plain_s": round(whole, 4),
            "elastic_over_plain": round(least_of["elastic"] / whole, 4),
            **({"optimizer_s": round(optimizer["plain"], 4)} if optimizer else {}),
            "memory_bytes": peak["plain"],
            "elastic_memory_ratio": round(peak["elastic"] / peak["plain"], 4),
        },
        "budgets": budgets,
        "limits": {"sliced_over_extracted": LIMIT_SLICED, "elastic_over_plain": LIMIT_FULL},
        "met": all(b["sliced_over_extracted"] <= LIMIT_SLICED for b in budgets)
        and least_of["elastic"] / whole <= LIMIT_FULL,
    }


def main() -> int:
    words = parser(
        __doc__, quick="a toy model: shows that it runs, measures overheads only", repetitions=5, device=True
    )
    fractions = "fractions of the parent's parameters"
    words.add_argument("--budgets", type=listed(float), default="0.75,0.5,0.25", help=fractions)
    arguments = start(words)
    if not all(0 < fraction < 1 for fraction in arguments.budgets):
        words.error(f"--budgets {arguments.budgets} must be {fractions}, each between 0 and 1")
    start_megatron()
    arch, length = (QUICK, 128) if arguments.quick else (FULL, 2048)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    how = {"length": length, "repetitions": arguments.repetitions, "device": device, "dtype": dtype}
    result = measure(arch, arguments.budgets, **how)
    return finish(arguments, {**result, "load_average_at_end": round(os.getloadavg()[0], 2)})


if __name__ == "__main__":
    raise SystemExit(main())
