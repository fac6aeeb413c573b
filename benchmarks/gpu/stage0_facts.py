"""Stage 0: what machine this is, whether everything imports, and what its memory and its tensor cores reach."""

import importlib
import platform
from importlib.metadata import version
from importlib.util import find_spec

import torch
from registry import Found, Machine, check

IMPORTED = (
    "megatron.core",
    "nemo_elastic.mcore.models.build",
    "nemo_elastic.mcore.family.family_model",
    "nemo_elastic.serving",
)
NAMED = ("torch", "megatron-core", "nemo-toolkit", "transformers", "numpy", "triton")


@check(stage=0, seconds=60)
def facts(machine: Machine) -> Found:
    """Versions, and imports of Megatron and of this package"""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in NAMED:
        try:
            found[name] = version(name)
        except ImportError:
            found[name] = "not installed"
    for name in ("mamba_ssm", "causal_conv1d", "transformer_engine", "nemo"):
        found[f"has_{name}"] = find_spec(name) is not None
    for name in IMPORTED:
        importlib.import_module(name)
    if machine.is_cuda:
        about = torch.cuda.get_device_properties(machine.device)
        found |= {"memory_gib": round(about.total_memory / 2**30, 1), "capability": f"{about.major}.{about.minor}"}
    return Found(found)


@check(stage=0, seconds=20, predicted={"copy_tb_per_s": (2.6, 3.4), "gemm_tflops": (700, 850)})
def ceilings(machine: Machine) -> Found:
    """Copy of 4 GiB and a bf16 product of 8192 cubed"""
    count, size = (1 << 20, 256) if machine.tiny else (1 << 30, 8192)
    source, target = (torch.empty(count, dtype=torch.float32, device=machine.device) for _ in range(2))
    copied = machine.milliseconds(lambda: target.copy_(source))
    left, right = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    product = machine.milliseconds(lambda: left @ right)
    return Found({"copy_tb_per_s": 8e-9 * count / copied, "gemm_tflops": 2e-9 * size**3 / product})
