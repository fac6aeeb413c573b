"""Fixtures of all tests: the pools of distributed workers, kept for the whole session; which cases of a sweep run."""

from collections.abc import Iterator

import pytest
import sweep
from small_run import Server
from worker_pool import WorkerPool, open_pool

import nemo_elastic.mcore  # noqa: F401, before any test imports Megatron: see `mcore.runtime.login_node`


def pytest_addoption(parser: pytest.Parser) -> None:
    sweep.add_options(parser)


def pytest_report_header(config: pytest.Config) -> str:
    return f"sweeps: {config.getoption('--sweep')}, seed {sweep.seed_of(config)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sweep.leave_out(config, items)


@pytest.fixture(scope="session")
def pool2() -> Iterator[WorkerPool]:
    """Two processes: TP2, PP2 or DP2."""
    yield from open_pool(2)


@pytest.fixture(scope="session")
def pool4() -> Iterator[WorkerPool]:
    """Four processes: TP2 x PP2, TP4, PP4, ..."""
    yield from open_pool(4)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """Megatron's parallel state for one process, in this process."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_elastic.mcore.runtime import cpu

    cpu.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs of seconds in processes that may die; `whole` is one of 16 steps that nobody disturbed."""
    server = Server(tmp_path_factory.mktemp("small_runs"))
    server.run(server.folder / "whole", "train.loggers=[tensorboard]")
    yield server
    server.close()
