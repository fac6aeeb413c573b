"""A NaN stops every rank before it spoils anything; SIGTERM saves and stops; both go on bit-equal."""

from pathlib import Path

import pytest
from small_run import Server, difference

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
LAYOUTS = {
    "one": ([], 1),
    "tp2": (["train.tensor_model_parallel_size=2"], 2),
    "pp2": (["train.pipeline_model_parallel_size=2"], 2),
    "dp2": ([], 2),
}


def checkpoints(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def stamps(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (out / "checkpoints").rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_poisoned_weight_stops_all_ranks_and_is_named(small_runs: Server, layout: str) -> None:
    overrides, size = LAYOUTS[layout]
    out = small_runs.ranked(f"nan_{layout}")
    poison = {"step": 7, "layer": 5}
    text = small_runs.run(out, *overrides, codes=[2], size=size, poison=poison)
    assert text.count("a problem to mend") == 1 and "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "has a NaN or Inf" in line]
    assert "step 7: budget " in line and "the output of layer 5 (Mamba)" in line
    assert "its mixer.in_proj.weight is not finite" in line and "--resume" in line
    assert checkpoints(out) == ["step=3"]  # the last good one, and no marker of an unfinished one
    if layout != "one":
        return
    small_runs.run(out, resume=True)
    whole = small_runs.folder / "whole"
    assert difference(out / "checkpoints" / "step=15", whole / "checkpoints" / "step=15") == []


@pytest.mark.parametrize("layout", ["one", "pp2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_is_named_and_never_reaches_the_weights(small_runs: Server, layout: str, value: float) -> None:
    overrides, size = LAYOUTS[layout]
    out = small_runs.ranked(f"gradient_{layout}_{value}")
    poison = {"step": 5, "layer": 5, "kind": "gradient", "value": value}
    text = small_runs.run(out, *overrides, "train.save_every_steps=1", codes=[2], size=size, poison=poison)
    assert "step 5: budgets " in text and "the gradient of decoder.layers.5.mixer.in_proj.weight" in text
    assert checkpoints(out) == [f"step={n}" for n in range(4)]


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
def test_sigterm_saves_and_a_resumed_run_ends_bit_equal(small_runs: Server, layout: str) -> None:
    overrides, size = LAYOUTS[layout]
    out = small_runs.ranked(f"signal_{layout}")
    text = small_runs.run(out, *overrides, codes=[143], size=size, signal_at=6)
    assert "stopped after step 6 of 16" in text and "go on with --resume" in text and "Traceback" not in text
    assert checkpoints(out) == ["step=3", "step=5"] and not (out / "nested").exists()
    small_runs.run(out, *overrides, resume=True, size=size)
    whole = small_runs.folder / "whole"
    if layout != "one":
        whole = small_runs.ranked(f"undisturbed_{layout}")
        small_runs.run(whole, *overrides, size=size)
    assert difference(out / "checkpoints" / "step=15", whole / "checkpoints" / "step=15") == []
    assert difference(out / "nested", whole / "nested") == []


def test_without_preemption_a_signal_ends_the_process(small_runs: Server) -> None:
    out = small_runs.ranked("no_preemption")
    pids = small_runs.start(out, "train.preemption=false", signal_at=6)
    assert small_runs.wait(pids) != [143] and checkpoints(out) == ["step=3"]


def test_resuming_a_run_that_had_ended_only_nests(small_runs: Server) -> None:
    import shutil

    whole, out = small_runs.folder / "whole", small_runs.folder / "ended"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "nested")
    before = stamps(out)
    small_runs.run(out, resume=True)
    assert stamps(out) == before
    assert difference(out / "nested", whole / "nested") == []
