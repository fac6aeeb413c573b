"""NeMo on a machine without a GPU: Megatron's shims, and what `nl.Trainer` + `nl.MegatronStrategy` need on top.

NeMo's own shims are for machines without a GPU only; Megatron's are chosen by what is missing. `install()` may be
called before or after NeMo is imported (the modules are imported here and changed in place), and must be called before
the trainer is built. Lines are those of nemo-toolkit 2.7.3.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import torch

from nemo_elastic.mcore.runtime import cpu
from nemo_elastic.mcore.runtime.cpu import Shim
from nemo_elastic.mcore.runtime.torch_on_cpu import CPU, TorchOnCpu, is_cuda, see_torch_on_cpu

_installed: list[str] = []


def _tensor_moves() -> None:
    stock = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and is_cuda(args[0]):
            args = (CPU, *args[1:])
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return stock(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _side_stream() -> None:
    cuda = TorchOnCpu(torch.cuda, Stream=lambda: None, stream=lambda _: nullcontext())
    see_torch_on_cpu("nemo.lightning.megatron_parallel", cuda=cuda)


def _pinned_metrics() -> None:
    see_torch_on_cpu("nemo.lightning.pytorch.strategies.megatron_strategy", ["tensor"])
    see_torch_on_cpu("nemo.lightning.pytorch.plugins.data_sampler", ["tensor"])


def _seed_tracker() -> None:
    init = importlib.import_module("nemo.lightning.megatron_init")
    stock = init._set_random_seed

    def set_random_seed(seed: int) -> None:
        stock(seed)
        stage = init.get_pipeline_model_parallel_rank()
        init.tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage)

    init._set_random_seed = set_random_seed


def _restore_device() -> None:
    importlib.import_module("nemo.lightning.io.pl")._fix_tensors_device = lambda checkpoint: checkpoint


SHIMS: tuple[Shim, ...] = (
    Shim(
        "tensor_moves",
        (
            "lightning/megatron_parallel.py:577 Module.cuda",
            "collections/llm/gpt/model/base.py:103 Tensor.cuda",
            'lightning/pytorch/strategies/megatron_strategy.py:801 Tensor.to("cuda")',
        ),
        "the model, each batch and each logged number are moved to the GPU by name",
        _tensor_moves,
    ),
    Shim(
        "side_stream",
        ("lightning/megatron_parallel.py:617",),
        "the model is wrapped for data parallelism on a CUDA stream of its own",
        _side_stream,
    ),
    Shim(
        "pinned_metrics",
        (
            "lightning/pytorch/strategies/megatron_strategy.py:801,850,881",
            "lightning/pytorch/plugins/data_sampler.py:192",
        ),
        "logged numbers are made in page-locked memory, which only CUDA can allocate",
        _pinned_metrics,
    ),
    Shim(
        "seed_tracker",
        ("lightning/megatron_init.py:238",),
        "the tracker of tensor-parallel seeds is filled only when a GPU is counted; layers then fail to initialise",
        _seed_tracker,
    ),
    Shim(
        "restore_device",
        ("lightning/io/pl.py:495 _fix_tensors_device",),
        "restoring a checkpoint asserts that CUDA is initialised",
        _restore_device,
    ),
)


def install() -> tuple[str, ...]:
    """Make NeMo and megatron-core run on this machine; a no-op where nothing is missing. Idempotent.

    Returns:
        The names of the shims in force, Megatron's first.
    """
    of_megatron = cpu.install()
    if not torch.cuda.is_available() and not _installed:
        for shim in SHIMS:
            shim.apply()
            _installed.append(shim.name)
    return of_megatron + tuple(_installed)
