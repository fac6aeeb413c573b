"""How processes start and wait: each on a GPU of its own before the first collective, and as long as it takes."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from worker_pool import WorkerPool

from nemo_elastic.config.sections import TrainConfig
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.problems import ProblemsError


def started_on(gpus: int) -> list[tuple[str, Any]]:
    """What `start` does to torch, in order, where `gpus` are there; this rank is the process' number."""
    seen: list[tuple[str, Any]] = []
    number = dist.get_rank()

    def init(backend: str, **keywords: Any) -> None:
        seen.append((backend, keywords.get("device_id")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(number))
        patch.setenv("RANK", str(number))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "set_device", lambda device: seen.append(("set", device)))
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(dist, "init_process_group", init)
        process_groups.start(2, 1)
    return seen


def test_every_process_takes_its_gpu_before_it_meets_the_others(pool2: WorkerPool) -> None:
    for number, seen in enumerate(pool2.run(started_on, 2, tp=2)):
        device = torch.device("cuda", number)
        assert seen == [("set", device), ("nccl", device)]


def test_the_only_gpu_that_a_process_sees_is_its_own(pool2: WorkerPool) -> None:
    for seen in pool2.run(started_on, 1, tp=2):
        assert seen[0] == ("set", torch.device("cuda", 0))


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["bare", "left_over"])
def test_one_process_needs_nobodys_address(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    seen: list[dict[str, Any]] = []

    def init(backend: str, **keywords: Any) -> None:
        seen.append(keywords)
        raise InterruptedError

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # and back again afterwards
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(InterruptedError):
        process_groups.start()
    assert (seen[0]["rank"], seen[0]["world_size"]) == (0, 1) and isinstance(seen[0]["store"], dist.TCPStore)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ProblemsError, match=r"LOCAL_RANK: 4 .* shows 4 GPUs; start at most 4 here"):
        process_groups.own_gpu()


def waited(wait_minutes: float) -> str:
    """The outcome of a wait of seconds for the first rank, where collectives give up after half a second."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))
    process_groups.start(1, 1, wait_minutes=wait_minutes)
    try:
        if dist.get_rank() == 0:
            time.sleep(2)
        process_groups.barrier()
        return process_groups.on_first_rank(lambda: time.sleep(2) or "all there")
    except RuntimeError:
        return "gave up"
    finally:
        process_groups.start(1, 1, wait_minutes=TrainConfig().wait_minutes)
        dist.distributed_c10d._set_pg_timeout(dist.distributed_c10d.default_pg_timeout)


def test_a_wait_for_one_process_outlives_the_limit_of_collectives(pool2: WorkerPool) -> None:
    assert pool2.run(waited, 1.0) == ["all there"] * 2


def test_a_wait_has_a_limit_of_its_own(pool2: WorkerPool) -> None:
    assert pool2.run(waited, 1 / 120)[1] == "gave up"
