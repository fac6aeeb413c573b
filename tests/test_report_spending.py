"""The report's account of a run: time, speed, memory, FLOPs, plan against actual, sources, resumes, how to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import FLOPS_PER_STEP, PEAK_MEMORY, RESUMED, SOURCES, heldout, session, sources, write_run

from nemo_elastic.report.budget_rows import budget_rows
from nemo_elastic.report.loading import ways
from nemo_elastic.report.page import facts
from nemo_elastic.report.planned import planned_budgets, planned_run
from nemo_elastic.report.run_folder import RunFolder, read_run
from nemo_elastic.report.source_losses import short_name, source_rows
from nemo_elastic.report.spending import REST, STEPS, parts, shares, utilisation


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("account"))


@pytest.fixture(scope="module")
def run(out: Path) -> RunFolder:
    return read_run(out)


def rewritten(folder: Path, name: str, change: Any) -> RunFolder:
    path = folder / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return read_run(folder)


def test_the_parts_of_training_add_up_to_it(run: RunFolder) -> None:
    found = {part.name: part.seconds for part in parts(run)}
    inner = {part.name: part.seconds for part in parts(run) if part.part_of == "train"}
    assert inner.pop(REST) == pytest.approx(187.25 - sum(inner.values()))
    assert inner == {STEPS: 75.0, "validation": 26.0, "saving checkpoints": 9.0, "children before training": 4.0}
    assert list(found)[:2] == ["rank", "train"] and found["rank"] == 21.5
    assert sum(share for _, share in shares(run)) == pytest.approx(100)
    names = [name for name, _ in shares(run)]
    assert "train" not in names and "total" not in names and STEPS in names
    assert dict(shares(run))["rank"] == pytest.approx(100 * 21.5 / (21.5 + 187.25 + 2.5 + 9.75))


def test_without_results_the_log_and_the_ranking_say_the_times(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, steps=100, results=False))
    found = {part.name: part.seconds for part in parts(run)}
    expected = {"rank": 21.5, "train": 38.0, STEPS: 25.0, "validation": 10.0, "saving checkpoints": 3.0}
    assert found == expected


def test_speed_memory_and_flops_are_those_of_the_log(run: RunFolder) -> None:
    found = {name: (value, note) for name, value, note in facts(run)}
    assert found["throughput"] == (f"{2048 / 0.25:,.0f} tokens/s", "2 x CPU process")
    assert found["peak memory"] == (f"{(PEAK_MEMORY + 300) / 1e9:.4g} GB", "process that had most, resident")
    assert found["model FLOPs utilisation"] == ("not measured", f"{300 * FLOPS_PER_STEP:.3g} FLOPs in all")


def test_utilisation_is_of_the_gpus_that_each_session_had(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    of_gpus = [session(0, "H200"), session(RESUMED, "H200") | {"processes": 4}]
    run = rewritten(out, "logs/sessions.jsonl", lambda _: "".join(json.dumps(s) + "\n" for s in of_gpus))
    one = 100 * FLOPS_PER_STEP / (0.25 * run.conditions.peak_tflops * 1e12)
    assert utilisation(run) == pytest.approx((one / 2 + one / 4) / 2)
    assert {name: value for name, value, _ in facts(run)}["model FLOPs utilisation"] == f"{utilisation(run):.1f}%"
    memory = {one.what: one for one in planned_run(run)}["memory of the fullest GPU"]
    assert (memory.planned, memory.actual) == (4e9, PEAK_MEMORY + 300)


def test_the_plan_stands_beside_what_became_of_it(run: RunFolder) -> None:
    rows = {name: {one.what: one for one in pairs} for name, pairs in planned_budgets(run, budget_rows(run))}
    assert rows["full"]["parameters"].percent == 0 and rows["full"]["memory to serve"].percent == pytest.approx(0)
    small = rows["small"]["parameters"]
    assert small.actual == next(row.parameters for row in budget_rows(run) if row.name == "small")
    assert small.planned != small.actual and small.note == "by an even shrink"
    of_run = {one.what: one for one in planned_run(run)}
    assert of_run["steps"].percent == 0 and of_run["tokens of text"].actual == run_tokens(run)
    assert of_run["FLOPs"].percent == pytest.approx(100 * (300 / 330 - 1))
    for what in ("memory of the fullest GPU", "GPU-hours of the steps"):
        assert of_run[what].actual is None and of_run[what].note == "not compared: it ran on a CPU"


def run_tokens(run: RunFolder) -> int:
    return sum(stage.steps * stage.seq_length * stage.global_batch_size for stage in run.config.train.stages)


def test_sources_have_their_losses_before_and_now(run: RunFolder) -> None:
    rows = source_rows(run, budget_rows(run))
    assert [(row.name, row.tokens) for row in rows] == list(SOURCES.items())
    for row in rows:
        for name, (before, now) in zip(("full", "large", "small"), row.losses, strict=True):
            assert now == sources(name, 300)[row.name]["loss"] and before == sources(name, 0)[row.name]["loss"]
    for i, name in enumerate(("full", "large", "small")):
        mean = sum(row.tokens * row.losses[i][1] for row in rows) / sum(SOURCES.values())
        assert mean == pytest.approx(heldout(name, 300), rel=1e-12)
    assert short_name("a/x.txt", ["a/x.txt", "b/y.txt"]) == "x.txt"
    assert short_name("a/x.txt", ["a/x.txt", "b/x.txt"]) == "a/x.txt"


def test_before_training_is_of_the_final_shapes(tmp_path: Path) -> None:
    out = write_run(tmp_path, results=False)
    rows = {row.name: row.before for row in budget_rows(read_run(out))}
    assert rows == {name: heldout(name, 0) + 0.01 for name in ("full", "large", "small")}
    run = rewritten(out, "zero_shot.json", lambda text: text.replace('"num_layers": 12', '"num_layers": 11'))
    assert budget_rows(run)[2].before is None  # measured of other shapes, as was the first validation
    assert budget_rows(run)[1].before == rows["large"]
    (out / "zero_shot.json").write_text("[]")
    assert [row.before for row in budget_rows(read_run(out))] == [heldout("full", 0), None, None]


def test_every_child_has_lines_for_the_readers_that_can_say_it(run: RunFolder, out: Path) -> None:
    full, _, small = ({way.reader: way for way in ways(run, row)} for row in budget_rows(run))
    assert all(way.lines for way in full.values())
    for name, way in full.items():
        assert str(out) in way.lines
        if name != "llama.cpp":
            compile(way.lines, name, "exec")
    assert "this child has 16" in full["vLLM"].lines
    assert small["NeMo"].lines == "" and "ffn_hidden_size" in small["NeMo"].reason  # its sizes differ per layer
    assert small["transformers"].lines and small["llama.cpp"].lines
    assert f"nemo-elastic extract {out}/nested --budget small --format gguf --out {out}/gguf/small" in (
        small["llama.cpp"].lines
    )


def test_a_made_child_needs_no_extraction(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    (out / "hf" / "full").mkdir(parents=True)
    (out / "hf" / "full" / "config.json").write_text("{}")
    run = read_run(out)
    full = {way.reader: way.lines for way in ways(run, budget_rows(run)[0])}
    assert "extract" not in full["transformers"] and "extract" not in full["vLLM"] and "extract" in full["NeMo"]


def test_what_a_format_cannot_say_has_a_reason(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    run = rewritten(
        out,
        "config.json",
        lambda text: text.replace('"vocab_size": 2048', '"vocab_size": 2048, "activation_func": "silu"'),
    )
    found = {way.reader: way for way in ways(run, budget_rows(run)[0])}
    assert found["NeMo"].lines and found["llama.cpp"].reason and not found["llama.cpp"].lines
