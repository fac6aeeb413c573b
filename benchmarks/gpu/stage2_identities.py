"""Stage 2: a child computes the same masked, sliced and extracted, and no forward waits for the device.

With torch's kernels, and again with the compiled ones (`run.sh` starts a process for each: which are taken is decided
when Megatron is first imported). `tests/gpu` is run in both, too; on a CPU all of it skips, which is no result.
"""

import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from registry import ROOT, Found, Machine, check, difference, one_process

SIZES = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "mamba_num_groups": 4,
    "mamba_state_dim": 64,
    "vocab_size": 512,
}
CHILD = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
}
TINY_CHILD = {"hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 4, "mamba_num_heads": 8}
LAYERS = (0, 1, 3, 4, 6, 7)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
KERNEL_LIMIT = {torch.float32: 5e-4, torch.bfloat16: 3e-2}


def extracted(weights: dict[str, torch.Tensor], layout: Any, subnet: Any, dtype: torch.dtype) -> Any:
    """A plain Megatron model of the child's size with the weights that extraction cuts."""
    from small_parent import FFN_GROUPS, child_architecture

    from nemo_elastic.checkpoint.extract import child_tensors
    from nemo_elastic.checkpoint.reader import MemoryReader
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights

    arch = child_architecture(layout.architecture, subnet)
    model = build_plain_model(arch, params_dtype=dtype)
    cut = {t.name: t.read() for t in child_tensors(MemoryReader(weights), layout, subnet)}
    load_weights(model, cut, arch, ffn_groups=FFN_GROUPS)
    return model


def equal(machine: Machine, limits: dict[torch.dtype, float]) -> dict[str, float]:
    """Relative L2 differences of logits per dtype, in the forward and (masked against sliced) of the gradients.

    Raises:
        AssertionError: one above its limit.
    """
    one_process()
    from pool_elastic import elastic_model, layout_of, random_weights, run_plan, tokens
    from small_parent import architecture, space_of

    from nemo_elastic.mcore.elastic.plan import hard_plan

    arch = architecture(**({} if machine.tiny else SIZES))
    layout, subnet = layout_of(arch), space_of(arch).subnet(**(TINY_CHILD if machine.tiny else CHILD), layers=LAYERS)
    found = {}
    for dtype, limit in limits.items():
        ids, model = tokens(arch, length=64).to(machine.device), elastic_model(arch, dtype).to(machine.device)
        runs = {mode: run_plan(model, ids, hard_plan(layout, subnet, mode), layout) for mode in ("masked", "sliced")}
        child = extracted(random_weights(arch, dtype), layout, subnet, dtype).to(machine.device)
        with torch.no_grad():
            alone = child(ids, None, None)
        (masked, masked_gradients), (sliced, sliced_gradients) = runs["masked"], runs["sliced"]
        word = str(dtype).removeprefix("torch.")
        found |= {
            f"{word}_masked_sliced": difference(sliced, masked),
            f"{word}_extracted_sliced": difference(sliced, alone),
            f"{word}_gradients": max(
                difference(sliced_gradients[n], value) for n, value in masked_gradients.items() if value.any()
            ),
        }
        for name, value in found.items():
            assert not name.startswith(word) or value < limit * (10 if "gradients" in name else 1), (
                f"{name} {value:.2e}"
            )
    return found


def compiled_kernels() -> bool:
    """Whether the mixer's compiled kernels are on the path."""
    return all(find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


@check(stage=2, seconds=60, predicted={"float32_masked_sliced": (None, 1e-5), "bfloat16_masked_sliced": (None, 1e-2)})
def identities(machine: Machine) -> Found:
    """Masked, sliced and extracted, torch's kernels"""
    return Found(equal(machine, LIMIT), stand_in=machine.is_cuda and compiled_kernels())


@check(
    stage=2,
    seconds=60,
    needs_kernels=True,
    predicted={"float32_masked_sliced": (None, 5e-5), "bfloat16_masked_sliced": (None, 1e-2)},
)
def identities_kernels(machine: Machine) -> Found:
    """Masked, sliced and extracted, compiled kernels"""
    real = machine.is_cuda and compiled_kernels()
    return Found(equal(machine, KERNEL_LIMIT if real else LIMIT), stand_in=not real)


@check(stage=2, seconds=40, predicted={"masked_sliced": (None, 1e-5), "gradients": (None, 1e-4)})
def experts(machine: Machine) -> Found:
    """A mixture of experts, masked and sliced, in fp32 (in bf16 a tie may choose another expert)"""
    one_process()
    from expert_features import parts
    from pool_elastic import elastic_model, layout_of, run_plan, tokens
    from small_parent import space_of

    from nemo_elastic.mcore.elastic.plan import hard_plan

    arch, function = parts("nemotron")
    layout, subnet = layout_of(arch), space_of(arch).subnet(hidden_size=36, num_moe_experts=4, moe_ffn_hidden_size=8)
    model, ids = elastic_model(arch, function=function).to(machine.device), tokens(arch).to(machine.device)
    (masked, whole), (sliced, cut) = (
        run_plan(model, ids, hard_plan(layout, subnet, mode), layout) for mode in ("masked", "sliced")
    )
    logits = difference(sliced, masked)
    gradients = max(difference(cut[n], value) for n, value in whole.items() if value.any())
    assert logits < 1e-5 and gradients < 1e-4, (logits, gradients)
    return Found({"masked_sliced": logits, "gradients": gradients})


@check(stage=2, seconds=20, predicted={"waits": (0, 0)})
def waits(machine: Machine) -> Found:
    """Waits for the device in a forward and backward, masked and sliced"""
    one_process()
    from pool_elastic import elastic_model, layout_of, tokens
    from small_parent import architecture, space_of

    from nemo_elastic.mcore.elastic.plan import hard_plan

    arch = architecture(**({} if machine.tiny else SIZES))
    subnet = space_of(arch).subnet(**(TINY_CHILD if machine.tiny else CHILD), layers=LAYERS)
    model, ids, count = elastic_model(arch).to(machine.device), tokens(arch, length=64).to(machine.device), 0
    for mode in ("masked", "sliced"):
        plan = hard_plan(layout_of(arch), subnet, mode)
        model(ids, None, None, elastic=plan).sum().backward()  # kernels are compiled and masks made once
        if machine.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids, None, None, elastic=plan).sum().backward()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            count += 1
        finally:
            if machine.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    return Found({"waits": count}, stand_in=not machine.is_cuda)


@cache
def gpu_tests(machine: Machine) -> Found:
    """`tests/gpu` in a process of its own, once with the kernels that this process sees.

    Raises:
        AssertionError: a test failed, with the end of pytest's output.
    """
    files = ["tests/gpu/test_serving_gpu.py"] if machine.tiny else ["tests/gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    counts = {"failed": 0} | {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    }
    assert done.returncode == 0, done.stdout[-1500:]
    return Found(counts, stand_in=not counts.get("passed"))


@check(stage=2, seconds=80, predicted={"failed": (None, 0)})
def tests_gpu(machine: Machine) -> Found:
    """`tests/gpu`, torch's kernels"""
    return gpu_tests(machine)


@check(stage=2, seconds=80, needs_kernels=True, predicted={"failed": (None, 0)})
def tests_gpu_kernels(machine: Machine) -> Found:
    """`tests/gpu`, compiled kernels"""
    found = gpu_tests(machine)
    return Found(found.values, stand_in=found.stand_in or not compiled_kernels())
