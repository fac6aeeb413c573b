"""What a run logs beside its losses: sources, time, memory, FLOPs, its starts; and children before training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import Server, records

from nemo_elastic.config.load import load_values
from nemo_elastic.cost.counts import flops
from nemo_elastic.family import family_of
from nemo_elastic.files import read_json
from nemo_elastic.processes.zero_shot import FILE, losses_before, read_zero_shot

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
STAGES = "train.stages=[{steps: 8, seq_length: 32, global_batch_size: 8}]"
HOW = ("router.shapes=even", "train.val_samples=11", "distill.budgets_per_batch=1", STAGES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("spending"))
    (found.folder / "other.txt").write_text("".join(f"{i} of other words, {i % 7} and {i % 11}\n" for i in range(4000)))
    yield found
    found.close()


def blend(server: Server) -> str:
    return f"data.blend=[{{path: {server.folder}/text.txt, weight: 3}}, {{path: {server.folder}/other.txt, weight: 1}}]"


@pytest.fixture(scope="module")
def whole(server: Server) -> Path:
    """Shapes that are given from the first step, two sources, one process."""
    out = server.folder / "blended"
    server.run(out, *HOW, "data.paths=[]", blend(server))
    return out


def test_the_loss_is_the_weighted_mean_of_its_sources(whole: Path) -> None:
    validations = records(whole, "validation")
    assert [record["step"] for record in validations] == [0, 6, 8]
    for record in validations:
        for name, loss in record["losses"].items():
            sources = record["sources"][name]
            assert [Path(path).name for path in sources] == ["text.txt", "other.txt"]
            tokens = [one["tokens"] for one in sources.values()]
            assert sum(tokens) == 11 * 32 and tokens[0] > 2 * tokens[1] > 0
            mean = sum(one["loss"] * one["tokens"] for one in sources.values()) / sum(tokens)
            assert loss == pytest.approx(mean, rel=1e-14)
    text, other = (one["loss"] for one in validations[-1]["sources"]["full"].values())
    assert abs(text - other) > 0.01


def test_one_source_has_no_losses_of_its_own(server: Server) -> None:
    out = server.folder / "plain"
    server.run(out, *HOW)
    assert all(record["sources"] == {} for record in records(out, "validation"))


def test_children_before_training_are_the_final_shapes_of_the_sorted_parent(whole: Path) -> None:
    found, first, last = read_zero_shot(whole), *(records(whole, "validation")[i] for i in (0, -1))
    assert found["seconds"] > 0
    for name, entry in found["budgets"].items():
        assert entry["subnet"] == last["subnets"][name] == first["subnets"][name]
        assert entry["loss"] == first["losses"][name]  # the same weights, shapes and text: the same bits
        assert entry["sources"] == first["sources"][name]
        assert entry["loss"] != last["losses"][name]
    assert losses_before(whole, last["subnets"]) == first["losses"]
    other = {**last["subnets"], "small": last["subnets"]["large"]}
    assert set(losses_before(whole, other)) == {"full", "large"}


def test_a_learned_shape_is_measured_at_the_end(small_runs: Server) -> None:
    """By the published recipe, which begins with what an untrained router says: it ends elsewhere."""
    out = small_runs.ranked("published")
    small_runs.run(out, "router.recipe=paper", "router.lr=0.1")
    found, first, last = read_zero_shot(out), *(records(out, "validation")[i] for i in (0, -1))
    assert {name: entry["subnet"] for name, entry in found["budgets"].items()} == last["subnets"]
    moved = [name for name, subnet in last["subnets"].items() if subnet != first["subnets"][name]]
    assert moved
    assert found["budgets"]["full"]["loss"] == first["losses"]["full"]
    assert all(found["budgets"][name]["loss"] != first["losses"][name] for name in moved)


@pytest.mark.parametrize(("tp", "pp", "replicas"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_every_layout_measures_the_same(server: Server, whole: Path, tp: int, pp: int, replicas: int) -> None:
    out = server.folder / f"tp{tp}pp{pp}dp{replicas}"
    sizes = (f"train.tensor_model_parallel_size={tp}", f"train.pipeline_model_parallel_size={pp}")
    server.run(out, *HOW, "data.paths=[]", blend(server), *sizes, size=tp * pp * replicas)
    expected = read_zero_shot(whole)["budgets"]
    for name, entry in read_zero_shot(out)["budgets"].items():
        assert entry["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5)
        for path, one in entry["sources"].items():
            assert one["tokens"] == expected[name]["sources"][path]["tokens"]
            assert one["loss"] == pytest.approx(expected[name]["sources"][path]["loss"], rel=1e-5)
    steps, session = records(out, "train"), records(out, "sessions")[0]
    assert session["processes"] == tp * pp * replicas
    assert [s["flops"] for s in steps] == pytest.approx([s["flops"] for s in records(whole, "train")])


def test_a_resumed_run_says_so_and_measures_once(server: Server, whole: Path) -> None:
    out = server.folder / "resumed"
    server.run(out, *HOW, "data.paths=[]", blend(server), codes=(143,), signal_at=5)
    log = Path(f"{out}.log").read_text()
    assert "go on with --resume" in log
    assert not (out / FILE).exists()
    server.run(out, *HOW, "data.paths=[]", blend(server), resume=True)
    assert [record["step"] for record in records(out, "sessions")] == [0, 5]
    assert read_zero_shot(out)["budgets"] == read_zero_shot(whole)["budgets"]
    before = (out / FILE).stat().st_mtime_ns
    server.run(out, *HOW, "data.paths=[]", blend(server), resume=True)
    assert (out / FILE).stat().st_mtime_ns == before


def test_time_memory_and_work_are_logged(whole: Path) -> None:
    steps, validations, saves = (records(whole, kind) for kind in ("train", "validation", "saves"))
    assert [record["step"] for record in saves] == [4, 8]
    assert all(record["seconds"] > 0 for record in (*steps, *validations, *saves))
    session = records(whole, "sessions")[0]
    assert session["step"] == 0 and session["processes"] == 1 and session["device"] == "cpu"
    memory = [record["peak_memory_bytes"] for record in validations]
    assert memory == sorted(memory) and memory[0] > 1e8
    planned = session["planned"]
    assert planned["steps"] == 8 and planned["tokens"] == 8 * 8 * 32 and planned["memory_bytes"] > 0
    assert planned["flops"] == pytest.approx(
        sum(s["flops"] for s in steps), rel=0.3
    )  # which budget a batch draws: chance


def test_flops_of_a_step_are_those_of_what_it_ran(whole: Path) -> None:
    run = load_values(read_json(whole / "config.json")["values"])
    family = family_of(run)
    subnets = {n: family.space.subnet_from_dict(s) for n, s in records(whole, "validation")[0]["subnets"].items()}
    per_token = {n: flops(family.layout, subnet, sequence_length=32) / 32 for n, subnet in subnets.items()}
    for step in records(whole, "train"):
        students = sum(3 * row["tokens"] * per_token[name] for name, row in step["budgets"].items())
        assert step["flops"] == pytest.approx(students + 8 * 32 * per_token["full"], rel=1e-12)


def test_verify_fills_in_what_was_before(server: Server, whole: Path) -> None:
    server.call("extract", whole / "nested", "--all", "--out", whole / "children", log=whole / "extract.log")
    server.call("verify", whole / "nested", log=whole / "verify.log")
    results: dict[str, Any] = json.loads((whole / "results.json").read_text())
    first = records(whole, "validation")[0]["losses"]
    assert {row["name"]: row["heldout_before"] for row in results["budgets"]} == first
    assert results["parent"]["heldout_loss"] == first["full"]
