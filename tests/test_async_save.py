"""`train.async_save`: what is written beside a run is what a run that waits would write, and never half of it counts.

Writers are slowed down where a moment in which a save is open must be met.
"""

import multiprocessing
import os
import queue
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import Server, difference, helpers_of, records

pytest.importorskip("nemo.lightning")
slow = pytest.mark.slow
ASYNC = "train.async_save=true"
EIGHT = "train.stages=[{steps: 8, seq_length: 32, global_batch_size: 8}]"
LAYOUTS = {
    "tensor": ["train.tensor_model_parallel_size=2"],
    "pipeline": ["train.pipeline_model_parallel_size=2"],
    "data, optimizer sharded": ["train.use_distributed_optimizer=true"],
}


def wait_for(what: Callable[[], bool], pids: list[int], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert helpers_of(pids, 0.0), "the run is over, and it never came"
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.003)


def with_save_open(server: Server, out: Path, *words: str, size: int = 1, seconds: float = 4.0) -> list[int]:
    """Start a run; the steps 5 and 6 have ended, and the checkpoint of step 4 is still being written."""
    pids = server.start(out, ASYNC, *words, size=size, slow={"writer": seconds})
    wait_for(lambda: (out / "logs").exists() and any(r["step"] >= 6 for r in records(out, "train")), pids)
    assert unfinished(out) == ["step=3-unfinished"], "the run goes on while the files are written"
    assert len(helpers_of(pids, 0.0)) >= 2 * size, "beside each process of the run there is one that writes"
    return pids


def unfinished(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").glob("*-unfinished"))


def whole(out: Path) -> list[str]:
    from nemo_elastic.processes.training_checkpoints import whole_checkpoints

    return [p.name for p in whole_checkpoints(out)]


def in_a_forked_process(work: Callable[..., object], *arguments: object) -> None:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_results_of_a_process_that_has_ended_are_whole_or_none() -> None:
    from nemo_elastic.mcore.checkpoint.writer import Results

    results, large = Results(), {0: os.urandom(3_000_000)}  # no pipe holds that while nobody reads
    in_a_forked_process(results.put, large)
    assert results.get_nowait() == large
    with pytest.raises(queue.Empty):
        Results().get_nowait()
    cut = Results()
    in_a_forked_process(cut.put, large)
    os.truncate(cut._file.fileno(), 1_000_000)
    with pytest.raises(queue.Empty):
        cut.get_nowait()


def test_only_a_forked_process_leaves_signals_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_elastic.mcore.checkpoint import writer

    results, owners = writer.Results(), []
    monkeypatch.setattr(writer, "_belong_to", owners.append)
    write = writer.beside_the_run(lambda *arguments: arguments[-1].put(list(owners)))
    write("rank", "buckets", results)
    assert results.get_nowait() == [], "a save that the run waits for"
    beside = writer.Results()
    in_a_forked_process(write, "rank", "buckets", beside)
    assert beside.get_nowait() == [os.getpid()]


def test_a_save_that_ends_late_still_leads_to_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_kept_checkpoints import checkpoint

    from nemo_elastic.nemo.run import kept_checkpoints

    still_open, names = [True], lambda: sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(kept_checkpoints, "is_save_open", lambda trainer: still_open[0])
    with kept_checkpoints.KeptCheckpoints(tmp_path, 1) as keep:
        checkpoint(tmp_path, 4)
        keep.on_save_checkpoint(None)
        mark = checkpoint(tmp_path, 8).with_name("step=7-unfinished")
        mark.touch()
        keep.on_train_batch_start(None)
        keep.on_train_batch_start(None)
        assert names() == ["step=3", "step=7", "step=7-unfinished"], "nothing goes before the next one is whole"
        mark.unlink()
        still_open[0] = False
        keep.on_train_batch_start(None)
    assert names() == ["step=7"]
    with kept_checkpoints.KeptCheckpoints(tmp_path, 1) as keep:
        checkpoint(tmp_path, 12)  # became whole while the next save waited for it
        keep.on_save_checkpoint(None)
    assert names() == ["step=11"]


@slow
def test_it_writes_what_a_run_that_waits_writes(small_runs: Server) -> None:
    out, undisturbed = small_runs.ranked("beside"), small_runs.folder / "whole"
    pids = small_runs.start(out, ASYNC)
    assert small_runs.wait(pids) == [0], Path(f"{out}.log").read_text()[-6000:]
    assert helpers_of(pids) == [] and whole(out) == whole(undisturbed) and unfinished(out) == []
    for name in whole(undisturbed):
        assert difference(out / "checkpoints" / name, undisturbed / "checkpoints" / name) == []
    for name in ("step=11", "step=15"):
        shutil.rmtree(out / "checkpoints" / name)
    shutil.rmtree(out / "nested")
    small_runs.run(out, ASYNC, "train.keep_checkpoints=2", resume=True)
    assert whole(out) == ["step=11", "step=15"], "what ended last led to a deletion, too"
    for part in ("checkpoints/step=15", "nested"):
        assert difference(out / part, undisturbed / part) == []


@slow
@pytest.mark.sweep(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(small_runs: Server, layout: str) -> None:
    waits, beside = (small_runs.ranked(f"{layout}_{how}".replace(" ", "_")) for how in ("waits", "beside"))
    small_runs.run(waits, *LAYOUTS[layout], EIGHT, size=2)
    small_runs.run(beside, *LAYOUTS[layout], EIGHT, ASYNC, size=2)
    assert whole(beside) == whole(waits) == ["step=3", "step=7"]
    for part in ("checkpoints/step=3", "checkpoints/step=7", "nested"):
        assert difference(beside / part, waits / part) == []


@slow
@pytest.mark.sweep(1)
@pytest.mark.parametrize("who", ["group", "last worker"])
def test_a_signal_waits_for_the_open_save_and_for_its_own(small_runs: Server, who: str) -> None:
    out = small_runs.ranked(f"signal beside {who}")
    pids = with_save_open(small_runs, out, LAYOUTS["tensor"][0], size=2)
    if who == "group":  # the processes that write belong to it
        for pid in pids:
            os.killpg(pid, signal.SIGTERM)
    else:
        os.kill(pids[-1], signal.SIGTERM)
    assert small_runs.wait(pids) == [143, 143], Path(f"{out}.log").read_text()[-6000:]
    text = Path(f"{out}.log").read_text()
    assert helpers_of(pids) == [] and unfinished(out) == []
    assert whole(out)[0] == "step=3" and len(whole(out)) == 2 and f"saved {out}/checkpoints/{whole(out)[1]}" in text


@slow
def test_a_nan_waits_for_the_open_save(small_runs: Server) -> None:
    out = small_runs.ranked("nan_beside")
    small_runs.run(out, ASYNC, codes=(2,), poison={"step": 6, "layer": 1}, slow={"writer": 4.0})
    assert whole(out) == ["step=3"] and unfinished(out) == []


@slow
def test_a_second_save_waits_for_the_first(small_runs: Server) -> None:
    out = small_runs.ranked("two_saves")
    pids = small_runs.start(out, ASYNC, EIGHT, "train.save_every_steps=2", slow={"writer": 0.8})
    most = 0
    while helpers_of(pids, 0.0):
        most = max(most, len(writing(out)))
        time.sleep(0.003)
    assert small_runs.wait(pids) == [0], Path(f"{out}.log").read_text()[-6000:]
    assert most == 1 and whole(out) == ["step=1", "step=3", "step=5", "step=7"]


def writing(out: Path) -> list[str]:
    """Checkpoints of which Megatron has begun, and not ended: its first file is there, its last is not."""
    begun = [p.parent for p in (out / "checkpoints").glob("step=*/weights/common.pt")]
    return [p.parent.name for p in begun if not (p / "metadata.json").exists()]


@slow
def test_ctrl_c_gives_the_open_save_up(small_runs: Server) -> None:
    out = small_runs.ranked("interrupted_beside")
    pids = with_save_open(small_runs, out, seconds=30.0)
    os.kill(pids[0], signal.SIGINT)
    begun = time.monotonic()
    assert small_runs.wait(pids) == [130] and time.monotonic() - begun < 12
    text = Path(f"{out}.log").read_text()
    assert "is given up" in text and "Traceback" not in text, text[-6000:]
    assert helpers_of(pids) == [] and whole(out) == [] and unfinished(out) == ["step=3-unfinished"]
