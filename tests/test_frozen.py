"""Forced subnets and frozen routers: no router, nothing random, and budgets that are missed are said."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.family import family_of
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.family.budget_notes import notes_at
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.problems import ProblemsError
from nemo_elastic.router.model import Router
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.shapes.search import propose_uniform

ROOT = Path(__file__).resolve().parent.parent
TINY = "tiny_parent.yaml"
SMALL = "{hidden_size: 96, ffn_hidden_size: 128, num_layers: 13}"
STEPS = 20


def planner_of(*words: str, seed: int = 1) -> Planner:
    """Of a run whose shapes a router learns, unless it is frozen."""
    run = load_config(TINY, words if "router.frozen=true" in words else ["router.shapes=learned", *words]).config
    family = family_of(run)
    timeline = Timeline.of(run.router, STEPS)
    conditions = serving_of(run.report, family.architecture).conditions
    return Planner(family, run.router, family.layout, timeline=timeline, seed=seed, **conditions)


def everything_planned(planner: Planner, router: Router | None = None) -> list:
    found = []
    for step in range(STEPS):
        state = planner.begin_step(router, step)
        for name in ("full", "large", "small"):
            (planned,) = planner.micro_batch(router, state, {name: 1.0}, step)
            found.append((name, planned.plan, planner.loss(planned)))
        planner.end_step(state)
    return found


def test_a_frozen_router_is_no_router_and_plans_the_uniform_subnets_whatever_the_seed():
    frozen = planner_of("router.frozen=true")
    assert frozen.learned == () == frozen.family.learned
    with pytest.raises(ValueError, match="at least one learned budget"):
        Router(frozen.family.space, frozen.learned, frozen.config)
    first, second = everything_planned(frozen), everything_planned(planner_of("router.frozen=true", seed=2))
    assert first == second
    learned = planner_of()
    expected = {"full": None} | {
        name: hard_plan(learned.layout, propose_uniform(cost, tolerance=learned.config.tolerance), "sliced")
        for name, cost in learned.costs.items()
    }
    assert all(plan == expected[name] and loss is None for name, plan, loss in first)
    assert frozen.current_subnets(None, 0) == frozen.current_subnets(None, STEPS - 1)


def test_forced_subnets_go_before_the_uniform_ones_and_are_all_that_runs():
    words = ("router.frozen=true", f"elastic.subnets={{small: {SMALL}}}")
    planner = planner_of(*words)
    subnets = planner.current_subnets(None, 0)
    assert (subnets["small"].hidden_size, subnets["small"].num_layers) == (96, 13)
    assert subnets["large"] == planner_of().uniform["large"]
    plans = {name: plan for name, plan, _ in everything_planned(planner)}
    assert plans["small"] == hard_plan(planner.layout, subnets["small"], "sliced")
    half = planner_of(f"elastic.subnets={{small: {SMALL}}}")  # not frozen: the other budget is learned
    assert half.learned == ("large",)
    with pytest.raises(ProblemsError, match=r"elastic.subnets.full: is another network"):
        planner_of("elastic.subnets={full: {hidden_size: 96}}")


def test_a_learned_run_is_random_in_its_seed():
    """What the tests above would not notice if plans could not differ at all."""
    found = []
    for seed in (1, 2):
        planner = planner_of("router.warmup_fraction=0.0", seed=seed)
        router = Router(planner.family.space, planner.learned, planner.config, seed=seed)
        state = planner.begin_step(router, 0)
        (planned,) = planner.micro_batch(router, state, {"small": 1.0}, 0)
        found.append({name: p.detach().tolist() for name, p in planned.output.probabilities.items()})
    assert found[0] != found[1]


def test_a_budget_that_is_missed_is_said_once_and_in_words():
    forced = planner_of(f"elastic.subnets={{small: {SMALL}, large: {SMALL}}}")
    state = forced.begin_step(None, 0)
    notes = notes_at(forced, state, True)
    assert [n.split(":")[0] for n in notes] == ["small", "large"]
    assert "below the budget (router.tolerance 0.01)" in notes[1] and notes_at(forced, state, False) == []
    planner = planner_of()
    router = Router(planner.family.space, planner.learned, planner.config, seed=1)
    steps = {step: notes_at(planner, planner.begin_step(router, step), step == 0) for step in range(STEPS)}
    assert {step for step, notes in steps.items() if notes} == {planner.timeline.frozen}
    assert all("the router's choice missed the budget by" in note for note in steps[planner.timeline.frozen])
    chosen = replace(planner.choices(router)["small"], error=-0.05, argmax_error=0.2, lost_log_probability=1.0)
    assert chosen.note(0.01).endswith("repaired to -5.0%; elastic.dims has nothing nearer")


def test_plan_says_what_a_forced_subnet_misses(capsys):
    assert main(["plan", "--config", TINY, "--json", f"elastic.subnets={{small: {SMALL}}}", "router.frozen=true"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [b["origin"] for b in plan["budgets"]] == ["parent", "frozen", "forced"]
    small = plan["budgets"][2]
    assert small["error"] == pytest.approx(small["parameters"] / (0.5 * plan["parent"]["parameters"]) - 1, abs=1e-12)
    assert any(f"its forced subnet is {abs(small['error']):.1%}" in note for note in plan["notes"])


@pytest.mark.slow
def test_two_frozen_runs_are_the_same_to_the_bit_and_leave_no_router(tmp_path):
    words = (
        "router.frozen=true", "train.stages=[{steps: 3, global_batch_size: 4}]", "train.val_samples=4",
        "train.val_every_steps=3", "rank.samples=4", "rank.depth_samples=2", "train.save_every_steps=3",
    )  # fmt: skip
    found = []
    for name in ("first", "second"):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-m", "nemo_elastic", "train", "--config", TINY, "--out", str(out), "--json", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        nested = out / "nested" / "elastic"
        assert not (nested / "router.safetensors").exists()
        records = [json.loads(line) for line in (out / "logs" / "train.jsonl").read_text().splitlines()]
        assert all("router" not in record for record in records)
        validations = [json.loads(line) for line in (out / "logs" / "validation.jsonl").read_text().splitlines()]
        subnets = json.loads((nested / "manifest.json").read_text())["subnets"]
        found.append((subnets, [v["losses"] for v in validations], [r["budgets"] for r in records]))
    for left, right in zip(*found, strict=True):
        assert left == right


@pytest.mark.slow
def test_a_run_finds_its_shapes_between_ranking_and_training_and_again_on_a_resume(tmp_path):
    """`router.shapes: greedy`, one command: what is trained is what `plan --search` proposes from the run's scores."""
    words = [
        "router.frozen=true", "router.shapes=greedy", "train.stages=[{steps: 2, global_batch_size: 4}]",
        "train.val_samples=4", "rank.samples=4", "rank.depth_samples=2",
    ]  # fmt: skip

    def run(verb, *more):
        command = [sys.executable, "-m", "nemo_elastic", verb, "--config", TINY, "--json", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    out = tmp_path / "run"
    run("train", "--out", str(out), *words)
    plan = run("plan", "--search", "greedy", "--ranking", str(out))
    proposed = {b["name"]: b["subnet"] for b in plan["budgets"]}
    manifest = json.loads((out / "nested" / "elastic" / "manifest.json").read_text())
    assert {name: manifest["subnets"][name] for name in proposed} == proposed
    config = json.loads((out / "config.json").read_text())
    assert config["values"]["elastic"]["subnets"] == proposed
    assert "router.shapes" in config["origins"]["elastic.subnets.small.hidden_size"]
    assert not (out / "nested" / "elastic" / "router.safetensors").exists()
    words[2] = "train.stages=[{steps: 3, global_batch_size: 4}]"
    done = run("train", "--out", str(out), "--resume", *words)
    again = json.loads((out / "nested" / "elastic" / "manifest.json").read_text())
    assert again["subnets"] == manifest["subnets"] and done["tokens"]
