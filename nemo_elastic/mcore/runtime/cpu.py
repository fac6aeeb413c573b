"""Megatron-core where something it counts on is missing: a GPU, mamba-ssm's kernels, a fused Adam. One explicit call.

`install()` applies the entries of `SHIMS` whose reason is given here: without CUDA all of them (over gloo), with CUDA
those whose package is not there, so that torch alone runs everything on a GPU with our own kernels; on a complete image
none. Each names the upstream lines (of megatron-core 0.16.1; 0.15.3 has them elsewhere in these files) that fail, or
silently do the wrong thing, without it. A shim is scoped to the upstream module that needs it (that module sees a
`torch` whose factories turn `device="cuda"` into the CPU) unless the call is spread over all of Megatron; those few are
set on torch itself.

Order does not matter: the modules are imported here and changed in place, so `install()` works before and after
`import megatron.core` (and NeMo). It must be called before the first model, optimizer or random tracker is made.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .torch_on_cpu import CPU, HonestTypeName, TorchOnCpu, see_torch_on_cpu

_installed: list[str] = []
_looked: list[bool] = []  # whether what is missing has been looked for


@dataclass(frozen=True)
class Shim:
    """One difference between Megatron as it expects to run and here: what it does, and which upstream lines need it.

    Attributes:
        package: with CUDA it is applied when this, of `PACKAGES`, is missing; None: only without CUDA.
    """

    name: str
    upstream: tuple[str, ...]
    why: str
    apply: Callable[[], None]
    package: str | None = None

    def is_needed(self) -> bool:
        """Whether what makes it needed is missing here."""
        return not torch.cuda.is_available() or (self.package is not None and not PACKAGES[self.package]())


def can_import(*modules: str) -> bool:
    """Whether all of them can be imported: a package that was built for another torch is there, and cannot."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError):
            return False
    return True


def has_mamba_kernels() -> bool:
    """Whether the CUDA kernels of Mamba are there; one of the two packages alone is of no use."""
    return can_import("mamba_ssm.ops.triton.ssd_combined", "causal_conv1d")


PACKAGES: dict[str, Callable[[], bool]] = {
    "mamba_ssm": has_mamba_kernels,
    "fused_adam": lambda: can_import("transformer_engine.pytorch.optimizers") or can_import("apex.optimizers"),
}


def _current_device() -> None:
    torch.cuda.current_device = lambda: CPU


def _synchronize() -> None:
    torch.cuda.synchronize = lambda device=None: None


def _literal_cuda() -> None:
    see_torch_on_cpu("megatron.core.pipeline_parallel.schedules", ["zeros"])
    see_torch_on_cpu("megatron.core.transformer.utils", ["ones"])
    see_torch_on_cpu("megatron.core.optimizer.optimizer", ["tensor"])
    see_torch_on_cpu("megatron.core.optimizer.clip_grads", ["tensor", "zeros"])
    see_torch_on_cpu("megatron.core.utils", ["tensor"])
    see_torch_on_cpu("megatron.core.models.common.embeddings.rope_utils", ["tensor"])


def _type_names() -> None:
    stock = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> str | torch.Tensor:
        result = stock(self, *args, **kwargs)
        return HonestTypeName(result) if isinstance(result, str) else result

    torch.Tensor.type = type_


def _tied_weight() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _random_state() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    cuda = TorchOnCpu(torch.cuda, get_rng_state=get_state, manual_seed=seed)
    see_torch_on_cpu(random.__name__, cuda=cuda)
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # fork() warns when the CPU's generator moved inside it; here that generator is the one it is meant to move.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _never_compile() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for processes started from here
    torch.compiler.set_stance("force_eager")  # for functions that torch.compile has already wrapped


def _mamba_kernels() -> None:
    mixer = importlib.import_module("megatron.core.ssm.mamba_mixer")
    ssd = importlib.import_module("nemo_elastic.mcore.kernels.ssd")
    norm = importlib.import_module("nemo_elastic.mcore.kernels.norm")
    mixer.HAVE_MAMBA_SSM = True
    mixer.ExtendedRMSNorm = norm.MixerNorm
    mixer.mamba_split_conv1d_scan_combined = ssd.mamba_split_conv1d_scan_combined
    mixer.mamba_chunk_scan_combined = ssd.mamba_chunk_scan_combined
    mixer.causal_conv1d_fn = ssd.causal_conv1d_fn
    mixer.causal_conv1d_update = ssd.causal_conv1d_update
    mixer.selective_state_update = ssd.selective_state_update


def _adam_steps() -> None:
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    cls = module.DistributedOptimizer
    save, load, place = cls.state_dict, cls.load_state_dict, cls._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> dict:
        of_torch = not module.HAVE_APEX_OR_TE  # Apex and TE keep the step beside the weights' states
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"] if of_torch):
            state = self.optimizer.state[parameter]
            if not state:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state.update(step=torch.tensor(0.0), **zeros)
        return save(self)

    def load_state_dict(self: Any, values: dict) -> None:
        load(self, values)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        place(self, model_param, {**{k: v for k, v in own.items() if k == "step"}, **tensors})

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_states


SHIMS: tuple[Shim, ...] = (
    Shim(
        "never_compile",
        ("jit.py:21", "activations.py:8 squared_relu", "fusions/fused_bias_dropout.py:67"),
        "jit_fuser is torch.compile: inductor asks for a CUDA device, or compiles for seconds at the first step",
        _never_compile,
    ),
    Shim(
        "current_device",
        (
            "tensor_parallel/layers.py:261,873,1218",
            "ssm/mamba_mixer.py:303",
            "distributed/param_and_grad_buffer.py:783",
        ),
        "every weight, buffer and receive buffer is created on torch.cuda.current_device()",
        _current_device,
    ),
    Shim(
        "synchronize",
        ("pipeline_parallel/p2p_communication.py:242,398",),
        "each pipeline exchange waits for the GPU; gloo's requests are waited for before it",
        _synchronize,
    ),
    Shim(
        "literal_cuda",
        (
            "pipeline_parallel/schedules.py:596,2138",
            "transformer/utils.py:35",
            "optimizer/optimizer.py:473,481,485,907",
            "optimizer/clip_grads.py:90,103,115,174,207",
            "utils.py:1207 local_multi_tensor_l2_norm",
            "models/common/embeddings/rope_utils.py:64",
        ),
        'token counters, causal mask, loss scale, gradient norm are made on "cuda", chunks of positions page-locked',
        _literal_cuda,
    ),
    Shim(
        "type_names",
        ("optimizer/clip_grads.py:167", "optimizer/optimizer.py:671,690", "optimizer/distrib_optimizer.py:361,420,582"),
        'parameters are sorted into groups by Tensor.type() == "torch.cuda.FloatTensor"',
        _type_names,
    ),
    Shim(
        "adam_steps",
        ("optimizer/distrib_optimizer.py:641,825,940",),
        "without Apex, torch's Adam has no state before its first step and a step counter per weight",
        _adam_steps,
        package="fused_adam",
    ),
    Shim(
        "tied_weight",
        ("models/common/language_module/language_module.py:244 setup_embeddings_and_output_layer",),
        "the last stage's copy of a tied embedding is sent to the GPU before it is made equal to the first stage's",
        _tied_weight,
    ),
    Shim(
        "random_state",
        ("tensor_parallel/random.py:41,72,235,237,238,422",),
        "the tracker of tensor-parallel seeds keeps CUDA generator states; without seeds TP ranks start equal",
        _random_state,
    ),
    Shim(
        "mamba_kernels",
        ("ssm/mamba_mixer.py:71,83,173,659,805,850,949,1031",),
        "the mixer refuses to be built without mamba_ssm, whose kernels are CUDA and Triton only",
        _mamba_kernels,
        package="mamba_ssm",
    ),
)


def install() -> tuple[str, ...]:
    """Make megatron-core run on this machine; a no-op where nothing is missing. Idempotent.

    Returns:
        The names of the shims in force: all without CUDA, those of missing packages with it.
    """
    if not _looked:
        _looked.append(True)
        for shim in SHIMS:
            if shim.is_needed():
                shim.apply()
                _installed.append(shim.name)
    return tuple(_installed)
