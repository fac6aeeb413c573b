"""The meta device in the GPU's place: where do our lines make CPU tensors, copy to the device, or wait for it?

    with on_meta_device(), DeviceTrace() as trace: ...
    trace.events == {("mcore/kernels/norm.py:RMSNorm.__init__", "cpu"), ...}

Under the CPU shims Megatron builds on whatever device they name. On `meta` every operation that mixes devices raises,
nothing costs memory at any model size, and a dispatch mode sees every tensor. What a GPU would have to be waited for
(`item()`, `cpu()`) has no value on meta: the mode notes the line and goes on with a made-up one. A copy to the device
counts unless it is `non_blocking`: CUDA stages small unpinned ones before it returns. Collectives move nothing.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import nemo_elastic
from nemo_elastic.mcore.runtime import cpu, torch_on_cpu
from nemo_elastic.nemo.plain import cpu as nemo_cpu

META = torch.device("meta")
OURS = str(Path(nemo_elastic.__file__).parent)
TESTS = str(Path(__file__).parent)
THEIRS = ("/megatron/core/", "/nemo/")
SHIMS = (cpu.__file__, torch_on_cpu.__file__, nemo_cpu.__file__, __file__)
aten = torch.ops.aten

Event = tuple[str, str]  # "file:function" of ours, and "cpu" | "copy" | "wait"


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """The shims' CPU is `meta`, and autocast, which does not know that device, does nothing."""
    autocast, before = torch.autocast, (cpu.CPU, nemo_cpu.CPU)
    cpu.install()
    forget_buffers()
    cpu.CPU = nemo_cpu.CPU = META
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
    try:
        yield
    finally:
        (cpu.CPU, nemo_cpu.CPU), torch.autocast = before, autocast
        forget_buffers()


def forget_buffers() -> None:
    """What Megatron gathers sequences into, kept by name and dtype alone: the next test's must be on its own device."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.get_global_memory_buffer().buffer.clear()


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()`; what autograd itself does inside is counted as ours."""
    loss.backward()


class DeviceTrace(TorchDispatchMode):
    """Attributes: `events`, a set of `Event`s: what lines of ours did. Megatron's and torch's own are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.events: set[Event] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._alone(func, args, kwargs)
        source = next((t for t in tree_leaves(args) if isinstance(t, torch.Tensor)), None)
        if func is aten._local_scalar_dense.default and source.is_meta:
            self._note("wait")
            return {torch.bool: True}.get(source.dtype, 1.0 if source.is_floating_point() else 1)
        if func is aten.equal.default and source.is_meta:
            self._note("wait")
            return True
        if func is aten._to_copy.default and source.is_meta and _is_cpu(kwargs.get("device")):
            self._note("wait")
            return _made_up(source, kwargs.get("dtype"))
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self._note("wait")
            return args[0].copy_(_made_up(args[1], None))
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            given = args[1] if func is aten.copy_.default else source
            if not given.is_meta and out.is_meta and given.dim() and not kwargs.get("non_blocking"):
                self._note("copy")
        made = source is None or func is aten.lift_fresh.default  # what is computed from CPU tensors is no new event
        if made and any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in tree_leaves(out)):
            self._note("cpu")
        return out

    def _alone(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A collective: run on small placeholders; its outputs are the tensors that were to be written."""
        if not any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        placeholders = tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape[:1], dtype=t.dtype), (args, kwargs))
        done = func(*placeholders[0], **placeholders[1])
        return (args[0], done[-1]) if isinstance(done, tuple) else done

    def _note(self, what: str) -> None:
        place = _our_line()
        if place is not None:
            self.events.add((place, what))


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _made_up(like: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Rows that sum to one, as probabilities do; zeros for integers."""
    value = 1 / (like.shape[-1] if like.dim() else 1) if like.is_floating_point() else 0
    return torch.full(like.shape, value, dtype=dtype or like.dtype)


def _our_line() -> str | None:
    """`file:function` of the innermost frame that is ours or a test's `backward`; None below Megatron's or a test's."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == __file__ and frame.f_code.co_name == "backward":
            return "backward"
        if file in SHIMS:
            if file != __file__:
                return None
        elif file.startswith(OURS):
            name = frame.f_code.co_qualname.split(".<locals>")[0]
            return f"{file.removeprefix(OURS).lstrip('/')}:{name}"
        elif any(part in file for part in THEIRS) or file.startswith(TESTS):
            return None
        frame = frame.f_back
    return None


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain tensor attributes of all submodules, by name."""
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, part in module.named_modules():
        found |= {f"{name}.{k}": v for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
    return found
