"""`train.start_from`: students begin as a family of the same parent, to the bit; the parent still teaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import Server, records

from nemo_elastic.processes.zero_shot import read_zero_shot

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
STAGES = "train.stages=[{steps: 4, seq_length: 32, global_batch_size: 8}]"
EVEN = "router.shapes=even"


def begun(server: Server, *words: str) -> tuple[str, ...]:
    return (EVEN, STAGES, "train.log_every_steps=1", f"train.start_from={server.folder}/whole/nested", *words)


def last_subnet(server: Server, name: str) -> dict[str, object]:
    found = records(server.folder / "whole", "validation")[-1]["subnets"][name]
    return {dim: size for dim, size in found.items() if dim != "num_layers"}


def test_a_new_budget_starts_from_the_family(small_runs: Server) -> None:
    """A child of the family and the full member lose what they lost when it ended; what a new one loses is measured."""
    out = small_runs.ranked("touched")
    budgets = "elastic.budgets={full: 1.0, small: 0.6, between: 0.7}"
    small = f"elastic.subnets.small={json.dumps(last_subnet(small_runs, 'small'))}"
    small_runs.run(out, *begun(small_runs, budgets, small))
    ended = records(small_runs.folder / "whole", "validation")[-1]["losses"]
    first = records(out, "validation")[0]
    assert first["step"] == 0
    assert {name: first["losses"][name] for name in ("full", "small")} == {n: ended[n] for n in ("full", "small")}
    assert {name: entry["loss"] for name, entry in read_zero_shot(out)["budgets"].items()} == first["losses"]
    of_full = [row["budgets"]["full"]["kd"] for row in records(out, "train") if "full" in row["budgets"]]
    assert of_full[0] > 1e-5, "the teacher is the parent, not the family as it stands"


def test_without_it_they_start_from_the_parent(small_runs: Server) -> None:
    out = small_runs.ranked("untouched")
    small_runs.run(out, *begun(small_runs, "elastic.budgets={full: 1.0}", "train.start_from=null"))
    first, whole = (records(folder, "validation")[0]["losses"]["full"] for folder in (out, small_runs.folder / "whole"))
    assert first == whole


def test_a_resume_keeps_it(small_runs: Server) -> None:
    out = small_runs.folder / "touched"
    text = small_runs.run(out, *begun(small_runs, "train.start_from=null"), resume=True, codes=(2,))
    assert "train.start_from: null, but the run in" in text and "keep that to resume, or start anew" in text


def test_a_run_of_before_there_was_such_a_key_goes_on(small_runs: Server) -> None:
    out = small_runs.folder / "untouched"
    config = out / "config.json"
    written = json.loads(config.read_text())
    del written["values"]["train"]["start_from"], written["values"]["train"]["recipe"]
    config.write_text(json.dumps(written))
    small_runs.run(out, *begun(small_runs, "elastic.budgets={full: 1.0}", "train.start_from=null"), resume=True)


def test_a_run_does_not_start_from_what_it_writes(small_runs: Server) -> None:
    """With --force it would remove it first."""
    out = small_runs.folder / "whole"
    assert "lies in --out" in small_runs.run(out, *begun(small_runs), codes=(2,), flags=["--force"])
    assert (out / "nested").is_dir()


@pytest.mark.parametrize("kind", ["nothing", "other groups", "another order"])
def test_what_does_not_belong_is_refused(small_runs: Server, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "refused"
    words, message = {
        "nothing": ([f"train.start_from={tmp_path}"], "not a nested checkpoint"),
        "other groups": (["elastic.ffn_groups=4"], "is a family of another parent (elastic.ffn_groups differ)"),
        "another order": (["rank.samples=16", "rank.seed=5"], "is sorted by other scores than this run's; copy"),
    }[kind]
    text = small_runs.run(out, *begun(small_runs, *words), codes=(2,))
    said = [line for line in text.splitlines() if "train.start_from" in line]
    assert len(said) == 1 and message in said[0], text[-3000:]
    assert not (out / "checkpoints").exists()
    if kind != "another order":  # that one is known when the parent is ranked
        assert not out.exists()
