"""The CPU platform: nothing with a GPU, idempotent, in any import order; each shim needed where it says, and honest."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pool_plain
import pytest
import torch
from worker_pool import RankFailed, WorkerPool

from nemo_elastic.mcore import versions
from nemo_elastic.mcore.runtime import cpu, login_node
from nemo_elastic.nemo.plain import cpu as nemo_cpu

BUILD = """
import torch
from pool_plain import tiny_config, plain_model, SEQ
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
model = plain_model(tiny_config("M-*"), "M-*")
tokens = torch.arange(SEQ)[None]
print(model(tokens, tokens, None, labels=tokens).mean().item())
"""
BEFORE = "from nemo_elastic.mcore.runtime import cpu; cpu.install()"
AFTER = (
    "import nemo_elastic.mcore, megatron.core.models.mamba, megatron.core.optimizer, megatron.core.pipeline_parallel; "
    + BEFORE
)


def python(program: str) -> str:
    path = ":".join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITH_A_GPU = """
import sys, torch
torch.cuda.is_available = lambda: True
stock = (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.type, torch.Tensor.to)
from types import ModuleType
for name in {there}:
    for end in range(1, name.count(".") + 2):
        sys.modules.setdefault(".".join(name.split(".")[:end]), ModuleType(name))
from nemo_elastic.mcore.runtime import cpu
from nemo_elastic.nemo.plain import cpu as nemo_cpu
found = cpu.install()
assert nemo_cpu.install() == cpu.install() == found, found
assert stock == (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.type, torch.Tensor.to)
"""
MAMBA, ADAM = ["mamba_ssm.ops.triton.ssd_combined", "causal_conv1d"], ["transformer_engine.pytorch.optimizers"]
OURS = """
from megatron.core.ssm import mamba_mixer
from nemo_elastic.mcore.kernels import ssd
assert mamba_mixer.HAVE_MAMBA_SSM and issubclass(mamba_mixer.ExtendedRMSNorm, ssd.RMSNormGated)
for kernel in ("mamba_split_conv1d_scan_combined", "mamba_chunk_scan_combined", "causal_conv1d_fn"):
    assert getattr(mamba_mixer, kernel) is getattr(ssd, kernel)
"""


def test_nothing_happens_with_a_gpu_and_its_packages() -> None:
    whole = WITH_A_GPU.format(there=MAMBA + ADAM) + "assert found == ()\n"
    python(whole + "assert not [name for name in sys.modules if name.split('.')[0] in ('megatron', 'nemo')]")


@pytest.mark.parametrize(
    ("there", "shims"),
    [([], ("adam_steps", "mamba_kernels")), (ADAM + MAMBA[:1], ("mamba_kernels",))],
    ids=["torch alone", "no causal-conv1d"],
)
def test_a_gpu_without_a_package_takes_our_kernels(there: list[str], shims: tuple[str, ...]) -> None:
    first = "import nemo_elastic.mcore, megatron.core.ssm.mamba_mixer, megatron.core.optimizer\n"  # not of fakes
    python(first + WITH_A_GPU.format(there=there) + f"assert found == {shims}, found\n" + OURS)


LOGIN_NODE = """
import os, torch, torch.utils.cpp_extension
torch.version.cuda = "13.0"
def load_inline(**settings):
    [][0] if "TORCH_CUDA_ARCH_LIST" not in os.environ else None
    raise RuntimeError("nothing is compiled in a test")
torch.utils.cpp_extension.load_inline = load_inline
import nemo_elastic.nemo
import megatron.core.inference.unified_memory
print(os.environ["TORCH_CUDA_ARCH_LIST"])
"""


def test_megatron_can_be_imported_on_a_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert python(LOGIN_NODE).split() == ["9.0"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv(login_node.VARIABLE, "8.0")
    login_node.name_an_architecture()
    assert os.environ[login_node.VARIABLE] == "8.0"


def test_a_second_call_changes_nothing() -> None:
    first = cpu.install()
    functions = (torch.Tensor.type, torch.cuda.current_device)
    assert cpu.install() == first == tuple(shim.name for shim in cpu.SHIMS)
    assert (torch.Tensor.type, torch.cuda.current_device) == functions


def test_the_order_of_import_and_call_does_not_matter() -> None:
    losses = [float(python(order + BUILD).split()[-1]) for order in (BEFORE, AFTER)]
    assert losses[0] == losses[1]
    assert 5.0 < losses[0] < 15.0


@pytest.mark.skipif(versions.installed() != versions.TESTED[-1], reason="line numbers are those of the tested version")
@pytest.mark.parametrize(
    ("package", "shim"),
    [("megatron.core", shim) for shim in cpu.SHIMS] + [("nemo", shim) for shim in nemo_cpu.SHIMS],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_shim_names_upstream_lines_that_need_it(package: str, shim: cpu.Shim) -> None:
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    needs = re.compile(
        r"cuda|torch\.compile|jit_fuser|\.type\(\)|MAMBA_SSM|RMSNorm|_scan_combined|conv1d_(fn|update)|state_update"
        r"|\[\"step\"\]|dst_tensors"
    )
    assert shim.why and shim.upstream
    for entry in shim.upstream:
        file, numbers = re.match(r"(\S+\.py):([\d,]+)", entry).groups()
        lines = (root / file).read_text().splitlines()
        for number in map(int, numbers.split(",")):
            assert needs.search(lines[number - 1]), f"{file}:{number}: {lines[number - 1]}"


def test_type_names_compare_as_on_a_gpu_and_read_as_they_are() -> None:
    cpu.install()
    name = torch.zeros(1).type()
    assert name == "torch.cuda.FloatTensor" and name == "torch.FloatTensor" and str(name) == "torch.FloatTensor"
    assert name in ["torch.cuda.HalfTensor", "torch.cuda.FloatTensor"]
    assert name != "torch.cuda.HalfTensor" and name not in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_functions_wrapped_for_compilation_run_eagerly() -> None:
    cpu.install()
    compiled = torch.compile(lambda x: (x, torch.compiler.is_compiling()))
    assert compiled(torch.zeros(1))[1] is False


def test_tensor_parallel_ranks_draw_differently_and_leave_the_common_stream_alone(pool2: WorkerPool) -> None:
    (own0, common0, untouched0), (own1, common1, untouched1) = pool2.run(pool_plain.tracker_draws, tp=2)
    assert own0 != own1
    assert common0 == common1
    assert untouched0 and untouched1


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_the_pool_sets_the_layout(pool2: WorkerPool, tp: int, pp: int) -> None:
    found = pool2.run(pool_plain.layout, tp=tp, pp=pp)
    assert found == [(rank, rank % tp, rank // 2 if pp == 1 else rank, 2 // (tp * pp)) for rank in range(2)]


def test_the_pool_reports_the_rank_that_failed_and_goes_on(pool2: WorkerPool) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2.*fail_on.*this rank was told to fail"):
        pool2.run(pool_plain.fail_on, 1)
    assert pool2.run(pool_plain.layout) == [(0, 0, 0, 2), (1, 0, 0, 2)]


def test_the_pool_does_not_wait_for_ever() -> None:
    pool = WorkerPool(1)
    with pytest.raises(RankFailed, match=r"no answer within 1\.0 s from ranks \[0\]"):
        pool.run(time.sleep, 60, timeout=1.0)
