"""Child process of `test_ssd_oracle`: mamba-ssm's Triton kernels on a CPU, in Triton's interpreter.

``python mamba_ssm_oracle.py inputs.pt outputs.pt``. Runs in a Python that has torch, triton and mamba-ssm (which need
not be the one of the tests) and imports nothing of this project.
"""

import contextlib
import importlib.util
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import torch


def pretend_gpu() -> None:
    """mamba-ssm's package imports CUDA extensions and its autotuner times kernels on a GPU; neither is needed here."""
    spec = importlib.util.find_spec("mamba_ssm")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = package
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1)

    from triton.runtime import autotuner

    original = autotuner.Autotuner.__init__

    def with_one_config(self, fn, arg_names, configs, *args, **kwargs):
        smallest = sorted(configs or [], key=lambda c: sum(v for v in c.kwargs.values() if isinstance(v, int)))[:1]
        original(self, fn, arg_names, smallest or configs, *args, **kwargs)

    autotuner.Autotuner.__init__ = with_one_config


def run_scan(inputs: dict, chunk_size: int, grad_y: torch.Tensor, grad_final: torch.Tensor) -> dict:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    positional = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    named = {k: v for k, v in inputs.items() if k not in ("x", "dt", "A", "B", "C")}
    y, final = mamba_chunk_scan_combined(*positional, chunk_size, **named, dt_softplus=True, return_final_states=True)
    ((y * grad_y).sum() + (final * grad_final).sum()).backward()
    return {"y": y.detach(), "final": final.detach()} | {f"d{k}": v.grad for k, v in inputs.items()}


def run_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, **options) -> dict:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return {"y": rmsnorm_fn(x, weight, None, z=z, **options)}


def run_step(state: torch.Tensor, *args, **kwargs) -> dict:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    y = selective_state_update(state, *args, **kwargs)
    return {"y": y, "state": state}


if __name__ == "__main__":
    pretend_gpu()
    cases = torch.load(sys.argv[1])
    runners = {"scan": run_scan, "norm": run_norm, "step": run_step}
    torch.save({name: runners[c["kind"]](*c["args"], **c["kwargs"]) for name, c in cases.items()}, sys.argv[2])
