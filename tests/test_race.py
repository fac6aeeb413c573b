"""A race: candidates take equal turns, loss halves them, who is left is pinned; on every rank, over a resume."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import Server, difference, records

from nemo_elastic.config import load_config
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.data.blend import Blend, spread
from nemo_elastic.distill.resume import changed_keys
from nemo_elastic.family import family_of
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.family.budget_notes import notes_at
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.problems import ProblemsError
from nemo_elastic.report.race_rounds import PINNED, racers
from nemo_elastic.report.run_folder import read_run
from nemo_elastic.router.race import Race
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.shapes.candidates import Candidate
from nemo_elastic.shapes.search import propose_random

TINY, STEPS = "tiny_parent.yaml", 40
EQUAL = {"full": 1.0, "large": 1.0, "small": 1.0}


def race_of(counts: dict[str, int], rounds=(4, 8, 12), tolerance: float = 0.05) -> tuple[Planner, Race]:
    """A planner of the shipped parent whose budgets have so many candidates, drawn at random."""
    run = load_config(TINY, [f"router.tolerance={tolerance}"]).config
    family, timeline = family_of(run), Timeline.of(run.router, STEPS)
    conditions = serving_of(run.report, family.architecture).conditions
    planner = Planner(family, run.router, family.layout, timeline=timeline, seed=1, **conditions)
    found = {
        name: [Candidate(s, 0.0, i / 10) for i, s in enumerate(propose_random(planner.costs[name], n, seed=3,
                                                                              tolerance=tolerance))]
        for name, n in counts.items()
    }  # fmt: skip
    assert {name: len(row) for name, row in found.items()} == counts
    planner.race = Race(found, rounds)
    return planner, planner.race


def test_turns_are_equal_however_draws_fall_into_steps():
    planner, race = race_of({"large": 5, "small": 3})
    found, others = Counter(), Counter()
    for step in range(10):
        draws = [planner.budgets_of(EQUAL, step, i) for i in range(7)]
        for row in race.turns(draws):
            found.update(row.items())
        race.end_step(draws)
    _, other = race_of({"large": 5, "small": 3})
    flat = [planner.budgets_of(EQUAL, step, i) for step in range(10) for i in range(7)]
    for row in other.turns(flat):
        others.update(row.items())
    assert found == others and sum(found.values()) == sum("full" not in draw for draw in flat)
    for name in ("large", "small"):
        turns = [n for (budget, _), n in found.items() if budget == name]
        assert max(turns) - min(turns) <= 1 and len(turns) == len(race.candidates[name])


def test_losses_halve_the_candidates_and_the_last_round_leaves_one():
    _, race = race_of({"large": 6, "small": 3})
    assert [race.leader(n) for n in ("large", "small")] == [race.subnet(n, 0) for n in ("large", "small")]
    losses = {"large": dict(enumerate([3.0, 1.0, 2.0, 5.0, 1.0, 4.0])), "small": {0: 2.0, 1: 2.0, 2: 1.0}}
    left = []
    for step in (4, 8, 12):
        assert race.is_due(step) and not race.is_due(step + 1)
        contending = race.contenders()
        record = race.end_round(step, {n: {i: losses[n][i] for i in row} for n, row in contending.items()})
        left.append({name: s.numbers for name, s in race.standings.items()})
        assert record["step"] == step and set(record["budgets"]) == set(contending)
    assert left == [
        {"large": (1, 4, 2), "small": (2, 0)},  # ties by the smaller damage
        {"large": (1, 4), "small": (2,)},
        {"large": (1,), "small": (2,)},
    ]
    assert not race.is_due(12) and race.contenders() == {} and race.leader("large") == race.subnet("large", 1)


def test_who_is_far_behind_before_the_first_step_does_not_start():
    _, race = race_of({"large": 4, "small": 2})
    record = race.begin(1.0, {"large": {0: 1.3, 1: 1.2, 2: 1.33, 3: 1.31}, "small": {0: 1.5, 1: 1.4}}, 1.6)
    assert record["round"] == 0 and record["step"] == 0
    assert {n: s.numbers for n, s in race.standings.items()} == {"large": (1, 0, 3), "small": (1, 0)}
    close = race_of({"large": 4, "small": 2})[1]
    close.begin(1.0, {"large": {0: 1.003, 1: 1.0045, 2: 1.0081, 3: 1.2}}, 1.2)  # a few thousandths tell nothing
    assert close.standings["large"].numbers == (0, 1)
    at_once = race_of({"large": 4, "small": 2}, rounds=())[1]
    at_once.begin(1.0, {"large": {0: 1.3, 1: 1.2, 2: 1.2, 3: 1.21}}, 1.6)  # no rounds: nothing else decides
    assert at_once.standings["large"].numbers == (1,)
    better = race_of({"large": 4, "small": 2})[1]
    better.begin(1.0, {"large": {0: 0.9, 1: 1.2, 2: 1.1, 3: 0.95}}, 1.6)  # who loses nothing races
    assert better.standings["large"].numbers == (0, 3)


def test_a_micro_batch_runs_whose_turn_it_is_on_every_replica_and_the_winner_is_pinned():
    planner, race = race_of({"large": 4, "small": 2}, rounds=(12,))
    assert planner.timeline.frozen == 12 and planner.learned == ()
    ran: dict[str, Counter] = {"large": Counter(), "small": Counter()}
    for step in range(STEPS):
        draws = planner.draws_of(EQUAL, step, 8, 2)
        assert bool(draws) == (step < 12)
        state = planner.begin_step(None, step, draws)
        assert state.phase == ("race" if step < 12 else "frozen")
        for index in (0, 5, 2, 7, 1, 3, 6, 4):  # replicas may come to theirs in any order
            budgets = planner.budgets_of(EQUAL, step, index, 2)
            for planned in planner.micro_batch(None, state, budgets, index):
                assert planner.loss(planned) is None and planned.output is None
                if planned.budget == "full":
                    assert planned.plan is None
                elif step < 12:
                    numbers = [n for n, c in enumerate(race.candidates[planned.budget])
                               if hard_plan(planner.layout, c.subnet, "sliced") == planned.plan]  # fmt: skip
                    ran[planned.budget].update(numbers)
                else:
                    subnet = planner.current_subnets(None, step)[planned.budget]
                    assert planned.plan == hard_plan(planner.layout, subnet, "sliced")
        planner.end_step(state)
        if race.is_due(step + 1):
            race.end_round(step + 1, {n: {i: float(-i) for i in row} for n, row in race.contenders().items()})
    assert all(max(c.values()) - min(c.values()) <= 1 for c in ran.values())
    assert planner.current_subnets(None, STEPS - 1)["large"] == race.subnet("large", 3)
    assert planner.state.frozen == {"large": race.subnet("large", 3), "small": race.subnet("small", 1)}


def test_ranks_that_share_experts_run_one_candidate():
    planner, race = race_of({"large": 4, "small": 2})
    planner.sharing = 2
    draws = planner.draws_of(EQUAL, 0, 8)
    state = planner.begin_step(None, 0, draws)
    assert len(draws) == 4
    for index in range(0, 8, 2):
        one, other = ([p.plan for p in planner.micro_batch(None, state, planner.budgets_of(EQUAL, 0, i), i)]
                      for i in (index, index + 1))  # fmt: skip
        assert one == other
    planner.end_step(state)
    assert sum(s.turns for s in race.standings.values()) == sum("full" not in draw for draw in draws)


def test_a_checkpoint_has_the_race_and_refuses_another_one():
    planner, race = race_of({"large": 5, "small": 3})
    draws = [planner.budgets_of(EQUAL, 0, i) for i in range(5)]
    race.end_step(draws)
    race.end_round(4, {"large": dict(enumerate([1.0, 2.0, 0.5, 4.0, 5.0]))})
    kept = json.loads(json.dumps(planner.state_dict()))
    again, other = race_of({"large": 5, "small": 3})
    again.load_state_dict(kept)
    assert other.standings == race.standings
    fewer, _ = race_of({"large": 4, "small": 3})
    with pytest.raises(ProblemsError, match=r"elastic.budgets.large: has other candidates"):
        fewer.load_state_dict(kept)


@pytest.mark.parametrize(
    ("words", "frozen", "rounds"),
    [
        ((), 12, (4, 8, 12)),
        (("router.race_fraction=0.1", "router.race_rounds=2"), 4, (2, 4)),
        (("router.race_fraction=0.05", "router.race_rounds=5"), 2, (1, 2)),
        (("router.race_fraction=0",), 0, ()),
    ],
)
def test_rounds_are_even_and_end_with_the_race(words, frozen, rounds):
    run = load_config(TINY, words).config
    timeline = Timeline.of(run.router, STEPS)
    assert (timeline.frozen, timeline.rounds(run.router.race_rounds)) == (frozen, rounds)
    assert timeline.spans() == {"race": (0, frozen), "frozen": (frozen, STEPS)}


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ((), []),
        (("router.soft_fraction=0.4", "router.lr=1.0e-3"), ["router.soft_fraction, router.lr: of a learned router"]),
        (("router.soft_fraction=0.4", "router.shapes=learned"), []),
        (("router.recipe=paper", "router.soft_fraction=0.4"), []),
        (("router.shapes=even",), ["router.shapes=even is even shrinking from the first step"]),
        (("router.frozen=true",), []),
    ],
)
def test_what_nothing_reads_is_said(words, notes):
    found = family_of(load_config(TINY, words).config).notes
    said = [note for note in found if note.startswith("router.")]
    assert len(said) == len(notes) and all(note.startswith(word) for note, word in zip(said, notes, strict=True))


def test_a_winner_off_its_budget_is_said_when_it_is_pinned():
    planner, race = race_of({"large": 4, "small": 2}, rounds=(12,), tolerance=0.05)
    planner.config = replace(planner.config, tolerance=0.001)
    assert notes_at(planner, planner.begin_step(None, 0, planner.draws_of(EQUAL, 0, 8)), True) == []
    race.end_round(12, {n: {i: float(i) for i in row} for n, row in race.contenders().items()})
    notes = notes_at(planner, planner.begin_step(None, 12), False)
    assert {note.split(":")[0] for note in notes} <= {"large", "small"} and notes and "its raced subnet is" in notes[0]


def test_stages_name_the_race():
    stages = "train.stages=[{steps: 8, router: race}, {steps: 32, router: frozen}]"
    run = load_config(TINY, [stages]).config
    assert Timeline.of(run.router, STEPS, run.train.stages).rounds(2) == (4, 8)


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ((), "race"),
        (("router.frozen=true",), "even"),
        (("router.recipe=paper",), "learned"),
        (("router.frozen=true", "router.recipe=paper"), "even"),
        (("router.shapes=learned",), "learned"),
        (("router.shapes=greedy",), "greedy"),
        (("router.frozen=true", "router.shapes=search"), "search"),
    ],
)
def test_where_shapes_come_from(words, method):
    run = load_config(TINY, words).config
    family = family_of(run)
    assert run.router.method == method
    assert (family.raced, family.learned) == (
        (("large", "small") if method == "race" else ()),
        (("large", "small") if method == "learned" else ()),
    )
    assert set(family.forced) == (set() if method in ("race", "learned") else {"large", "small"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("router.frozen=true", "router.shapes=race"), "race is nothing frozen"),
        (("router.recipe=paper", "router.shapes=race"), "leaves nothing to learn by router.recipe=paper"),
        (("router.shapes=rase",), "'rase' must be one of auto, race, learned, search, greedy, even"),
        (("router.candidates=0",), "0 must be above 0"),
        (("router.candidate_spread=0.5",), "0.5 must be at least 1"),
        (("router.candidate_spread=.nan",), "must be at least 1"),
        (("router.race_spread=0.9",), "0.9 must be at least 1"),
        (("router.race_fraction=1.5",), "1.5 must be from 0 to 1"),
        (("router.shortfall=1",), "must be a part of the budget"),
        (("train.stages=[{steps: 4, router: soft}]",), "(router.shapes=learned has warmup, soft, hard, frozen)"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said):
    with pytest.raises(ProblemsError) as refused:
        load_config(TINY, words)
    assert len(refused.value.problems) == 1 and said in str(refused.value)


def test_a_run_of_before_races_goes_on_learning(tmp_path):
    """What a configuration without the new keys meant, against what it means now."""
    old = load_config(TINY, ["router.shapes=learned"]).values
    old = json.loads(json.dumps(old))
    for key in ("candidates", "candidate_spread", "race_spread", "shortfall", "race_fraction", "race_rounds"):
        del old["router"][key]
    old["router"] |= {"shapes": "even", "frozen": False}
    (tmp_path / "config.json").write_text(json.dumps({"values": old}))
    learned, raced, even = (load_config(TINY, words) for words in
                            (["router.shapes=learned"], [], ["router.frozen=true"]))  # fmt: skip
    assert changed_keys(tmp_path, learned.config, learned.values) == []
    for other in (raced, even):
        (problem,) = changed_keys(tmp_path, other.config, other.values)
        assert problem.key == "router.shapes" and "has 'learned'" in problem.message


class Numbers:
    """Samples that are their own numbers."""

    def __init__(self, per_epoch: int, name: int = 0) -> None:
        self.per_epoch, self.name = per_epoch, name

    def sample(self, index: int) -> tuple[int, int]:
        return self.name, index


@pytest.mark.parametrize(
    ("per_epoch", "count"), [(1000, 32), (65, 32), (64, 32), (63, 32), (7, 32), (2, 4), (10**7, 5)]
)
def test_windows_that_choose_are_not_those_that_are_reported(per_epoch, count):
    for source in (Numbers(per_epoch), Blend([Numbers(per_epoch, 1), Numbers(3 * per_epoch, 2)], [0.7, 0.3])):
        reported, choosing = spread(source, count), spread(source, count, between=True)
        assert reported and len(reported) == len(choosing) and not set(reported) & set(choosing)
        assert len(set(reported)) == len(reported) and len(set(choosing)) == len(choosing)
    assert spread(Numbers(1), 4) == spread(Numbers(1), 4, between=True)  # there is only this


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("race"), 12)
    yield made
    made.close()


RACE = ("router.shapes=race", "router.candidates=4", "router.race_fraction=0.75", "train.save_every_steps=4",
        "router.candidate_spread=4", "router.race_spread=9")  # fmt: skip


@pytest.mark.slow
def test_a_run_races_pins_and_says_so_and_is_the_same_over_a_resume_and_two_replicas(server):
    whole, again = server.folder / "whole", server.folder / "again"
    server.run(whole, *RACE)
    rounds = records(whole, "race")
    assert [r["step"] for r in rounds] == [0, 3, 6, 9][: len(rounds)] and len(rounds) > 2
    named = rounds[0]["candidates"]
    assert all(1 < len(row) <= 4 for row in named.values())
    assert [r["phase"] for r in records(whole, "train")] == ["race"] * 9 + ["frozen"] * 3
    manifest = json.loads((whole / "nested" / "elastic" / "manifest.json").read_text())
    for name, row in named.items():
        last = [r["budgets"][name] for r in rounds if name in r["budgets"]][-1]
        assert manifest["subnets"][name] == row[last["left"][0]]["subnet"]
        losses = list(last["losses"].values())
        assert losses == sorted(losses) and len(last["left"]) == 1
    shown = racers(read_run(whole))
    assert {r.budget: r.number for r in shown if r.end == PINNED} == {
        name: [r["budgets"][name] for r in rounds if name in r["budgets"]][-1]["left"][0] for name in named
    }
    assert sum(r.end.startswith("out ") for r in shown) == sum(len(row) - 1 for row in named.values())
    shutil.copytree(whole, again)
    for step in (7, 11):
        shutil.rmtree(again / "checkpoints" / f"step={step}")
    shutil.rmtree(again / "nested")
    server.run(again, *RACE, resume=True)  # from step 4, between two rounds
    assert difference(whole / "checkpoints" / "step=11", again / "checkpoints" / "step=11") == []
    two = server.ranked("two")
    server.run(two, *RACE, size=2)
    for ours, theirs in zip(records(two, "race"), rounds, strict=True):
        for name, row in theirs["budgets"].items():
            assert ours["budgets"][name]["left"] == row["left"] and ours["budgets"][name]["turns"] == row["turns"]
            assert ours["budgets"][name]["losses"] == pytest.approx(row["losses"], rel=1e-5)


@pytest.mark.slow
def test_a_resume_with_other_candidates_is_refused(server):
    out = server.ranked("refused") if (server.folder / "whole").is_dir() else server.folder / "refused"
    server.run(out, *RACE)
    shutil.rmtree(out / "checkpoints" / "step=11")
    shutil.rmtree(out / "nested")
    before = sorted(Path(out).rglob("*"))
    text = server.run(out, *RACE, "router.tolerance=0.01", resume=True, codes=(2,))
    assert "has other candidates than the run began its race with" in text and "Traceback" not in text
    assert [p for p in before if not p.exists()] == []
