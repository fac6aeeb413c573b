"""Every benchmark runs and says what its README promises; the README's table and figure come from the raw results.

Nothing here asserts a time: `--quick` shows that a script runs, not how fast.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PARTS = {
    "harness",
    "joint_worth",
    "joint_rows",
    "toy_router",
    "twins",
    "training_runs",
    "measures",
    "figure",
}  # imported by the scripts, or made of their results
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)
FAST = {"ssd", "router_budgets"}  # under 20 seconds: what the others take is mostly the import of Megatron or NeMo
ROWS = {
    name: re.findall(r"`([^`]+)`", keys)
    for name, keys in re.findall(r"^\| `(\w+)\.py` \|.*\|([^|]*)\|$", README, flags=re.MULTILINE)
}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def harness() -> ModuleType:
    return __import__("harness")


@pytest.fixture
def figure() -> ModuleType:
    return __import__("figure")


def test_the_readme_lists_every_script() -> None:
    assert sorted(ROWS) == SCRIPTS
    assert [name for name, keys in ROWS.items() if not keys] == []
    assert [name for name in PARTS if f"{name}.py" not in README] == []


@pytest.mark.parametrize("name", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS])
def test_quick(name: str, tmp_path: Path, harness: ModuleType) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == result
    assert result["benchmark"] == name
    assert result["quick"] is True
    assert {"cpu", "cores", "threads", "torch", "load_average_at_start"} <= result["machine"].keys()
    for path in ROWS[name]:
        found = [value for _, value in harness.values(result, path)]
        assert found, path
        assert None not in found, path


def test_the_table_is_what_the_results_give(figure: ModuleType) -> None:
    results = figure.read(FOLDER / "results")
    assert results
    assert figure.with_table(README, figure.table(results)) == README


def test_the_table_follows_a_result(figure: ModuleType) -> None:
    results = figure.read(FOLDER / "results")
    before = figure.table(results)
    results["ssd"]["cases"][0]["time_ratio"] = 0.5
    rows = [line for line in figure.table(results).splitlines() if line not in before.splitlines()]
    assert len(rows) == 1
    assert "| `ssd` |" in rows[0]
    assert "to 0.50 (4) | 0.060 | **no** |" in rows[0]


def test_quick_runs_are_no_results(figure: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "ssd.json").write_text(json.dumps({"quick": True}))
    assert figure.read(tmp_path) == {}
    assert "not measured yet" in figure.table({})


def test_every_result_has_a_row_and_every_row_a_script(figure: ModuleType) -> None:
    shown = {measure.benchmark for measure in figure.MEASURES}
    assert shown == set(SCRIPTS)
    assert {path.stem for path in (FOLDER / "results").glob("*.json")} <= shown


def test_the_figure_is_drawn(figure: ModuleType, tmp_path: Path) -> None:
    figure.draw(figure.read(FOLDER / "results"), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_least_limit_is_missed_from_below(figure: ModuleType) -> None:
    least = next(m for m in figure.MEASURES if m.least)
    section = least.path.split(".")[0]
    result = {section: {"layer_forwards_ratio": 1.5}, "required_layer_forwards_ratio": 1.8}
    assert figure.shown(least, result).met is False
    assert figure.shown(least, result).shares == [pytest.approx(1.2)]
    result[section]["layer_forwards_ratio"] = 2.0
    assert figure.shown(least, result).met is True


def test_runs_take_turns_and_the_first_round_does_not_count(harness: ModuleType) -> None:
    calls: list[str] = []
    runs = {name: (lambda n=name: calls.append(n)) for name in "ab"}
    found = harness.interleaved(runs, 2, before=lambda name: calls.append(f"before {name}"))
    assert calls == ["before a", "a", "before b", "b"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    times = [harness.Seconds(3.0, 1.0), harness.Seconds(1.0, 9.0), harness.Seconds(2.0, 5.0)]
    assert harness.median(times) == (2.0, 5.0)
    assert harness.least(times) == (1.0, 1.0)


def test_a_list_that_cannot_be_read_is_one_message(harness: ModuleType) -> None:
    import argparse

    assert harness.listed(int)("1,2") == [1, 2] and harness.listed(str)("a") == ["a"]
    with pytest.raises(argparse.ArgumentTypeError, match="'1,x' must be a comma separated list, each of it int"):
        harness.listed(int)("1,x")


def test_values_on_a_path(harness: ModuleType) -> None:
    result = {"cases": [{"ratio": 1}, {"ratio": 2}], "budgets": {"small": {"ratio": 3}}}
    assert list(harness.values(result, "cases.*.ratio")) == [(("cases", "0", "ratio"), 1), (("cases", "1", "ratio"), 2)]
    assert [v for _, v in harness.values(result, "budgets.*.ratio")] == [3]
    with pytest.raises(KeyError):
        list(harness.values(result, "cases.*.other"))


@pytest.mark.parametrize(("quick", "met", "code"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_a_missed_limit_is_an_exit_code(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, met: bool, code: int
) -> None:
    output = tmp_path / "x.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `start` sets it: put back afterwards
    monkeypatch.setattr(sys, "argv", ["some.py", "--output", str(output), *(["--quick"] if quick else [])])
    arguments = harness.start(harness.parser("doc", quick="", repetitions=5))
    assert harness.finish(arguments, {"met": met}) == code
    written = json.loads(output.read_text())
    assert (written["benchmark"], written["quick"], written["repetitions"]) == ("some", quick, 1 if quick else 5)


def test_a_family_in_fixed_subnets_costs_what_its_budgets_cost_alone() -> None:
    from nemo_elastic.config import load_config
    from nemo_elastic.plan.of_run import plan

    family_cost = __import__("family_cost")
    subnets = {row["name"]: row["subnet"] for row in plan(load_config("tiny_parent.yaml").config)["budgets"]}
    names = [*family_cost.FAMILIES, *(f"alone-{name}" for name in family_cost.BUDGETS)]
    words = {name: family_cost.words_of(name, 36, subnets) for name in names}
    flops = {name: family_cost.predicted_flops(words[name], subnets) for name in names}
    alone = sum(value for name, value in flops.items() if name.startswith("alone-"))
    assert flops["family_fixed"] == pytest.approx(alone, rel=1e-12)
    assert flops["family_shared"] < flops["family_fixed"] < flops["family"]


@pytest.mark.parametrize("steps", [6, 36])
def test_a_family_is_dealt_equal_tokens(steps: int) -> None:
    from nemo_elastic.config import load_config
    from nemo_elastic.router.sampling import sample_budgets

    family_cost = __import__("family_cost")
    run = load_config("tiny_parent.yaml", family_cost.words_of("family", steps, {})).config
    (stage,) = run.train.stages
    drawn = [
        name
        for step in range(stage.steps)
        for index in range(stage.global_batch_size // run.train.micro_batch_size)
        for name in sample_budgets(dict.fromkeys(run.elastic.budgets, 1.0), run.train.seed, step, index)
    ]
    assert {drawn.count(name) for name in run.elastic.budgets} == {2 * steps // 3}


def test_a_router_keeps_one_twin_where_every_search_by_scores_halves_both() -> None:
    joint_rows = __import__("joint_rows")
    for row in joint_rows.joint("twins", range(20, 22), 160, 5.0):
        assert row["least"] > 0
        for seed, lost in row["router"].items():
            assert row["least"] - 1e-6 <= lost < min(row[what] for what in joint_rows.SEARCHES), (row["budget"], seed)
            assert abs(row["error"][seed]) <= 0.01


def test_what_twins_share_is_in_no_score() -> None:
    joint_rows, twins = __import__("joint_rows"), __import__("twins")
    _, space = joint_rows.twin_space()
    shared, alone = (twins.Twins(space, work=work).scores() for work in (True, False))
    assert [shared.layers[i] for i in range(16)] == pytest.approx([alone.layers[i] for i in range(16)], abs=1e-6)
    for name, by_layer in shared.widths.items():
        for layer, row in by_layer.items():
            assert [x**2 for x in row] == pytest.approx([x**2 for x in alone.widths[name][layer]], abs=1e-6), name


def test_the_least_of_twins_is_that_of_trying_every_shape() -> None:
    toy_router, twins, joint_worth = __import__("toy_router"), __import__("twins"), __import__("joint_worth")
    choices = {**twins.CHOICES, "ffn_hidden_size": [1.0, 0.25], "mamba_num_heads": [1.0], "num_layers": [16, 13]}
    run, space = toy_router.space_of(choices, ["ffn_hidden_size"])
    objective = twins.Twins(space)
    costs = toy_router.costs_of(run, space, "fraction", (0.9, 0.7))
    shapes = joint_worth.choice_shapes(space)
    rows = [list(product(range(choices), repeat=count)) for count, choices in shapes.values()]
    every = [dict(zip(shapes, picked, strict=True)) for picked in product(*rows)]
    lost = [objective.lost_by(selection) for selection in every]
    for cost in costs.values():
        least = min(x for x, s in zip(lost, every, strict=True) if cost.error(cost.tables.cost(s)) <= 0.01)
        assert objective.least(cost, 0.01) == pytest.approx(least, abs=1e-6)


def test_scores_say_it_all_where_units_count_apart() -> None:
    joint_rows, joint_worth = __import__("joint_rows"), __import__("joint_worth")
    run, space = joint_rows.joint_space()
    objective = joint_worth.JointWorth(space, "apart")
    costs = joint_rows.costs_of(run, space, "fraction", joint_rows.BUDGETS)
    for name, best in objective.best(costs, 0.01).items():
        assert joint_worth.searched(objective, costs[name], 0.01)["wide"] == pytest.approx(objective.lost_by(best))
