"""torch as one upstream module sees it on a machine without CUDA: factories that turn `device="cuda"` into the CPU."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

CPU = torch.device("cpu")


class HonestTypeName(str):
    """`Tensor.type()` of a CPU tensor: reads `torch.FloatTensor`, and equals `torch.cuda.FloatTensor` too."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or (
            isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class TorchOnCpu(types.ModuleType):
    """`torch` as one upstream module sees it: the given names replaced, everything else torch's own."""

    def __init__(self, real: types.ModuleType, **replaced: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def is_cuda(device: object) -> bool:
    """Whether a `device=` argument (string, `torch.device`, index or None) means a GPU."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory whose `device="cuda"` becomes the CPU; page-locking, which needs CUDA, is dropped."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def see_torch_on_cpu(module_name: str, factories: Sequence[str] = (), **replaced: Any) -> None:
    """Let the upstream module `module_name` see a torch with CPU `factories` and `replaced` names."""
    module = importlib.import_module(module_name)
    made = {name: factory_on_cpu(getattr(torch, name)) for name in factories}
    module.torch = TorchOnCpu(torch, **made, **replaced)
