"""The small reproduction's parts: problems and chains, what is kept for scoring, scores, shapes, the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "paper_small"
sys.path.insert(0, str(FOLDER))

import problems as problems_module  # noqa: E402
from problems import SIZES, Problem, problems, scored_problems, training_file  # noqa: E402
from runs import BASES, BUDGETS, OTHER_SHAPES, PARENTS, RUNS, STEPS, WEIGHTS, parent_of  # noqa: E402


@pytest.mark.parametrize("kind", SIZES)
def test_chains_end_in_the_answer_of_reasoning_gym(kind: str) -> None:
    import reasoning_gym

    for size in SIZES[kind]:
        found = list(problems(kind, size, 50, seed=3))
        assert len({p.question for p in found}) == len(found) > 20
        again = reasoning_gym.create_dataset(kind, size=50, seed=3, **problems_module.options(kind, size))
        answers = {e["answer"].replace("'", "").replace("[", "").replace("]", "").replace(".0", "") for e in again}
        for p in found:
            said = {"number_sorting": p.answer.replace(" ", ", "), "spell_backward": p.answer.replace(" ", "")}
            assert said.get(kind, p.answer) in answers
            assert p.text.splitlines() == [p.question, *p.chain, f"= {p.answer}"]


def test_a_running_sum_is_right_at_every_step() -> None:
    for p in problems("chain_sum", 4, 50, seed=3):
        for line in p.chain:
            left, right = line.split("=")
            assert eval(left) == int(right)
        assert eval(p.question.removeprefix("sum ")) == int(p.answer)


def test_what_is_scored_is_never_trained_on(tmp_path: Path) -> None:
    training_file(tmp_path / "p.jsonl", counts=dict.fromkeys(SIZES, 400))
    questions = {json.loads(line)["text"].splitlines()[0] for line in (tmp_path / "p.jsonl").read_text().splitlines()}
    scored = scored_problems(each=8)
    assert len(scored) == 8 * 9 and len({(p.kind, p.size) for p in scored}) == 9
    assert not questions & {p.question for p in scored} and len(questions) > 2000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from nemo_elastic.data.tokenizer import BPETokenizer, train_bpe

    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    texts = [p.text for kind, sizes in SIZES.items() for size in sizes for p in problems(kind, size, 100, seed=5)]
    train_bpe(texts, 300).save(str(path))
    return BPETokenizer(path)


class Parrot:
    """A model that is sure of one document, and of nothing else."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        self.ids, self.vocab_size = ids, vocab_size

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*tokens.shape, self.vocab_size)
        for row in range(tokens.shape[0]):
            for at in range(min(tokens.shape[1], len(self.ids) - 1)):
                found[row, at, self.ids[at + 1]] = 20.0
        return found


def test_solved_is_what_greedy_decoding_writes(tokenizer) -> None:
    from score import ids_of, solve

    asked = next(problems("chain_sum", 3, 5, seed=7))
    other = Problem(asked.kind, asked.size, asked.question, asked.chain, asked.answer + "0")
    shorter = Problem(asked.kind, asked.size, asked.question, (), asked.answer)
    ids, question = ids_of(asked, tokenizer)
    parrot = Parrot(ids, tokenizer.vocab_size)
    written = list(ids[:question])
    while written[-1] != tokenizer.eod or len(written) == 1:
        written.append(int(parrot.logits(torch.tensor([written]))[0, -1].argmax()))
    assert tokenizer.decode(written[question:-1]) == asked.completion
    (loss, tokens, right), (_, _, wrong), (_, _, unlike) = solve(parrot, [asked, other, shorter], tokenizer)
    assert right and not wrong and not unlike
    assert tokens == len(ids) - question and loss < 1e-3


@pytest.mark.parametrize(("prefix", "times"), [("", 1), ("greedy-", 1), ("long-", 2), ("greedy-long-", 2)])
def test_equal_tokens_per_child(prefix: str, times: int) -> None:
    """A child alone has the steps that the family spends on it, stage by stage, and the shape that it has there."""
    family = RUNS[f"{prefix}family"]
    assert [stage["steps"] for stage in family.stages] == [times * n for n in STEPS]
    for child in ("large", "small"):
        alone, whole = (RUNS.get(f"{prefix}{kind}-{child}") for kind in ("alone", "whole"))
        expected = [round(times * STEPS[0] / len(BUDGETS)), round(times * STEPS[1] * WEIGHTS[child])]
        assert [stage["steps"] for stage in alone.stages] == expected
        assert alone.shapes_of == ("greedy" if prefix.startswith("greedy-") else family.name)
        assert family.shapes_of in (None, alone.shapes_of)
        if times == 1:
            assert sum(stage["steps"] for stage in whole.stages) == sum(STEPS) and whole.shapes_of == alone.shapes_of


SIZES_OF = {  # a child of the hybrids, of the transformer, whose blocks are dropped whole, and of the one with experts
    "parent.yaml": {"hidden_size": 168, "ffn_hidden_size": 448, "layers": [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]},
    "transformer.yaml": {"hidden_size": 168, "ffn_hidden_size": 320, "layers": [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]},
    "experts.yaml": {"num_moe_experts": 12, "moe_ffn_hidden_size": 72, "layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]},
}
MADE = sorted({(name, PARENTS[parent_of(seed)].config) for name, run in RUNS.items() for seed in run.seeds})


@pytest.mark.parametrize(("name", "parent"), MADE)
def test_every_run_is_a_configuration_that_can_run(name: str, parent: str) -> None:
    from nemo_elastic.config import load_config
    from nemo_elastic.family import family_of

    run = RUNS[name]
    given = {b: SIZES_OF[parent] for b in run.budgets if b != "full"} if run.shapes_of else {}
    config = load_config(FOLDER / parent, run.overrides(7, given)).config
    family = family_of(config, tuple(range(12)))
    assert config.train.seed == 7 and [b.name for b in family.budgets] == list(run.budgets)
    assert set(given) <= set(family.forced)
    assert run.shapes_of is None or run.shapes_of.partition(":")[0] in (*OTHER_SHAPES, *RUNS)


def test_a_seed_belongs_to_one_parent_and_its_runs_are_all_there() -> None:
    seeds = [seed for parent in PARENTS.values() for seed in parent.seeds]
    assert len(set(seeds)) == len(seeds) and all(seed in PARENTS[parent_of(seed)].seeds for seed in seeds)
    for run in RUNS.values():
        assert set(run.seeds) <= set(seeds) and len(set(run.seeds)) == len(run.seeds) > 0
        source = RUNS.get(run.shapes_of or "")
        assert source is None or set(run.seeds) <= set(source.seeds)  # nothing takes the shapes of a run never done
        assert BASES[run.base].trained or set(run.seeds) <= set(PARENTS[1].seeds)  # the untrained model is no parent's


def test_the_results_are_of_these_runs_and_of_the_kept_parent() -> None:
    """A file says what was run: nothing in `runs.py` was changed behind it; later parents are the kept ones."""
    import run

    kept = {n: json.loads((FOLDER / "results" / f"parent-{n}.json").read_text())["sha256"] for n in PARENTS}
    assert kept == {1: None} | {n: run.digest(FOLDER / "parents" / str(n)) for n in PARENTS if n > 1}
    for path in sorted((FOLDER / "results").glob("*.json")):
        found = json.loads(path.read_text())
        if path.stem.startswith("parent-"):
            continue
        made = RUNS[found["name"]]
        assert path.stem == f"{made.name}-{found['seed']}" and found["seed"] in made.seeds and not found["quick"]
        assert [dict(stage) for stage in made.stages] == found["stages"], path
        assert (made.shapes_of, set(made.budgets)) == (found["shapes_of"], set(found["score"])), path
        if BASES[made.base].trained and kept[parent_of(found["seed"])]:
            assert found["parent_sha256"] == kept[parent_of(found["seed"])]


def small_series(folder: Path):
    import run

    (folder / "results").mkdir()
    return run, run.Series(folder / "out", folder / "results", False)


def write_parent(folder: Path, number: int, sha256: str | None) -> None:
    score = {"seed": number, "sha256": sha256, "score": {}}
    (folder / "results" / f"parent-{number}.json").write_text(json.dumps(score))


def test_runs_on_a_parent_that_was_not_kept_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files would be compared with those of another one; refused before anything is made."""
    run, series = small_series(tmp_path)
    write_parent(tmp_path, 1, None)
    with pytest.raises(SystemExit) as stopped:
        run.prepare(series, [(RUNS["family"], 4), (RUNS["family"], 1)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--seeds 1,2,3: " in said and "--results FOLDER" in said
    assert not series.out.exists()


def test_runs_on_another_parent_than_the_known_one_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, series = small_series(tmp_path)
    weights = series.out / "parents" / "2"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"these")
    commands: list[str] = []
    monkeypatch.setattr(run.Series, "command", lambda self, script, *words: commands.append(script) or "")
    monkeypatch.setattr(run.Series, "prepared", lambda self, base, seed: weights)
    write_parent(tmp_path, 2, run.digest(weights))
    run.prepare(series, [(RUNS["family"], 4)])  # its own
    write_parent(tmp_path, 2, "0123456789abcdef")
    with pytest.raises(SystemExit) as stopped:
        run.prepare(series, [(RUNS["family"], 4)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "0123456789ab" in said and run.digest(weights)[:12] in said
    with pytest.raises(SystemExit):
        run.prepare(series, [(RUNS["alone-small"], 4)])
    assert "takes the shapes of family-4" in capsys.readouterr().err
    assert commands == ["parent", "parent"] * 2 and not list((tmp_path / "results").glob("family*"))


def test_random_shapes_meet_their_budgets() -> None:
    from shapes import random_subnets

    from nemo_elastic.config import load_config
    from nemo_elastic.cost.counts import parameters
    from nemo_elastic.family import family_of

    config = load_config(FOLDER / "parent.yaml", RUNS["family"].overrides(1, {})).config
    family = family_of(config, tuple(range(12)))
    full = parameters(family.layout, family.space.full_subnet())
    draws = [random_subnets(family, seed) for seed in (1, 2)]
    assert draws[0] != draws[1] and draws[0] == random_subnets(family, 1)
    for name, subnet in draws[0].items():
        count = parameters(family.layout, family.space.subnet_from_dict(subnet))
        assert count / full == pytest.approx(BUDGETS[name], rel=0.011)


def test_a_flat_order_puts_the_best_heads_into_the_kept_slots() -> None:
    from flat import flat_order

    scores, order = torch.tensor([3.0, 9.0, 1.0, 7.0, 8.0, 2.0, 6.0, 5.0]), torch.tensor([1, 3, 0, 2, 4, 6, 7, 5])
    moved = flat_order(scores, order, groups=2, kept=4)
    assert sorted(moved.tolist()) == list(range(8))
    heads = order[moved].view(2, 4)  # the parent's heads, group by group
    assert heads[:, :2].flatten().tolist() == [1, 4, 3, 6]  # scores 9, 8, 7, 6: two to a group, in order


def test_tokens_to_a_loss_are_read_between_validations() -> None:
    from readings import spent_to

    points = ((0, 4.0), (100, 3.0), (200, 2.0))
    curve = [{"tokens": {"x": t}, "losses": {"x": loss}, "cpu": 3 * t} for t, loss in points]
    assert spent_to(curve, "x", 2.5) == 150 and spent_to(curve, "x", 4.5) == 0
    assert spent_to(curve, "x", 1.9) is None and spent_to(curve, "x", 2.0) == 200
    assert spent_to(curve, "x", 2.5, "cpu") == 450


def result(losses: list[float], cpu: float, budgets: tuple[str, ...] = ("small",)) -> dict:
    """A run whose budgets all have these losses at its validations, `cpu` seconds and 100 tokens apart."""
    points = [
        {"tokens": dict.fromkeys(budgets, 100 * i), "cpu": cpu * i, "losses": dict.fromkeys(budgets, loss)}
        for i, loss in enumerate(losses)
    ]
    score = {budget: {"heldout_loss": losses[-1], "solved": 0.5} for budget in budgets}
    return {"curve": points, "score": score, "parameters": {**dict.fromkeys(budgets, 2), "full": 4}}


def test_time_is_read_to_the_masked_runs_last_loss() -> None:
    from readings import Results
    from tables import speed

    runs = {("whole-small", 1): result([3, 2.5, 1], 10), ("speed-masked-small", 1): result([3, 2.5, 2], 20)}
    (row,) = speed(Results(runs | {("speed-soft", 1): result([3, 1], 1)}, {}))  # without its partner: no row
    assert (row["cpu"], row["masked_cpu"], row["ratio"]) == ("20", "40", "0.50")
    assert row["small_to"] == "0.33" and row["large_to"] == "–"  # 13.3 of 40 seconds
    slower = {("whole-small", 1): result([3, 2.5, 2.1], 5), ("speed-masked-small", 1): result([3, 2.5, 2], 20)}
    assert speed(Results(slower, {}))[0]["small_to"] == "not reached"


def test_a_family_is_compared_seed_by_seed() -> None:
    from readings import Results
    from tables import headline

    children = ("large", "small")
    runs = {("family", seed): result([4, 3, 1], 1, children) for seed in (1, 2)}
    runs |= {(f"whole-{c}", seed): result([4, 3, 0.5 * seed], 1, (c,)) for c in children for seed in (1, 2)}
    runs |= {("shapes-own", 2): result([4, 3, 0.5], 1, children), ("alone-small", 2): result([4, 3, 2], 1)}
    rows = headline(Results(runs | {("family", 3): result([4, 4, 9], 1, children)}, {}))
    for row in rows:
        assert row["family"].startswith("3.6667 ±")  # all seeds; a comparison has those of both
        assert row["over_whole"] == "+50.00% ± 70.71%" and row["share"] == "50.0 ± 0.0"
    large, small = rows
    assert small["own_over_alone"] == "-75.00% (1 seed)" and small["over_alone"] == "-50.00% (1 seed)"
    assert large["own_over_alone"] == "–" and large["own"] == "0.5000"


def test_tokens_to_equal_loss_are_read_off_runs_that_ended() -> None:
    """Loss over the logarithm of tokens: where 100 tokens end at 3 and 400 at 1, 200 would end at 2."""
    from readings import Results, finished_to
    from tables import family_ratio, headline

    assert finished_to([(400, 1.0), (100, 3.0)], 2.0) == pytest.approx(200)
    assert (
        finished_to([(400, 1.0), (100, 3.0)], 4.0) == pytest.approx(50)
        and finished_to([(400, 1), (100, 3)], 0.9) is None
    )
    runs = {("family", 1): result([9, 9, 9, 9, 9, 2], 1, ("large", "small"))}  # 500 tokens of each
    for child in ("large", "small"):  # on the way both have losses that mean nothing: their rate is still high
        runs |= {
            (f"alone-{child}", 1): result([9, 3], 1, (child,)),
            (f"whole-{child}", 1): result([9, 1, 1, 1, 1], 1, (child,)),
        }
    ratio = family_ratio(Results(runs, {}), "family", ("large", "small"))
    assert (ratio["children"], ratio["all"]) == ("0.40 (1 seed)", "0.40 (1 seed)")  # 200 + 200 of 500 + 500
    assert headline(Results(runs, {}))[0]["tokens_alone"] == "0.4 (1 seed)"
    runs["family", 1] = result([9, 9, 9, 9, 9, 0.5], 1, ("large", "small"))
    assert family_ratio(Results(runs, {}), "family", ("large", "small"))["children"] == "more than 0.80"


def test_a_claim_holds_or_not_on_each_kind_of_parent() -> None:
    """Budget by budget, on the mean over seeds; hybrids together, other kinds by themselves."""
    from claims import claims
    from readings import Results

    def of(seed: int, **losses: tuple[float, float]) -> Results:
        members = {name.replace("_", "-"): {"large": a, "small": b, "full": 1.1} for name, (a, b) in losses.items()}
        scores = {n: {b: {"heldout_loss": loss} for b, loss in row.items()} for n, row in members.items()}
        return Results({(name, seed): {"score": score} for name, score in scores.items()}, {"heldout_loss": 1.0})

    first = of(1, family=(2.0, 3.0), shapes_even=(2.2, 3.3))
    second = of(4, family=(2.0, 3.0), greedy_family=(1.8, 2.7))
    assert claims({1: first, 2: second}) == []  # no other parent, nothing to say
    rows = claims({1: first, 2: second, 3: of(7, family=(2.0, 3.0), shapes_even=(2.2, 2.7), greedy_family=(2.2, 3.3))})
    even, greedy = (
        next(row for row in rows if row["words"].startswith(w)) for w in ("Shapes matter", "Greedy search ends")
    )
    others = [row for row in rows if row not in (even, greedy)]
    assert (even["1"], even["2"]) == ("`large` +10.00% (1 seed), `small` +10.00% (1 seed)", "–")
    assert even["3"] == "`large` +10.00% (1 seed), `small` -10.00% (1 seed)"
    assert (even["hybrid"], even["transformer"]) == ("yes", "in part")
    assert (greedy["1"], greedy["hybrid"], greedy["transformer"]) == ("–", "yes", "no")
    full = [row for row in others if "`full`" in row["3"]]
    assert {(row["3"], row["transformer"]) for row in full} == {("`full` +10.00% (1 seed)", "yes")} and len(full) == 2
    assert {row["transformer"] for row in others if row not in full} == {"–"}


def test_the_page_is_what_the_files_give(tmp_path: Path) -> None:
    """Nothing in docs/results.md was typed by hand."""
    command = [sys.executable, str(FOLDER / "results.py"), "--docs", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    made, shown = (sorted((folder / "results").iterdir()) for folder in (tmp_path, ROOT / "docs"))
    assert [path.name for path in made] == [path.name for path in shown]
    assert len({Image.open(path).info["Results"] for path in (*made, *shown)}) == 1


@pytest.mark.parametrize("kept", ["depth-*", "family-1.json", "*-1.json", "*-4.json"])
def test_a_part_of_the_runs_makes_a_page(kept: str, tmp_path: Path) -> None:
    """Of one group, of one run, of one seed: no claim about what has no file, no link to a figure that is not there."""
    folder = tmp_path / "results"
    folder.mkdir()
    for path in (*(FOLDER / "results").glob("parent-*.json"), *(FOLDER / "results").glob(kept)):
        shutil.copy(path, folder)
    command = [sys.executable, str(FOLDER / "results.py"), "--results", str(folder), "--docs", str(tmp_path / "docs")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "docs" / "results.md").read_text()
    linked = re.findall(r"\]\((results/[^)]+)\)", text)
    assert linked and all((tmp_path / "docs" / name).is_file() for name in linked)
    assert ("four children one by one take" in text) == (kept == "*-4.json")


def test_where_nothing_is_missing_nothing_is_made(tmp_path: Path) -> None:
    """Not even the parent, which takes longest."""
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(tmp_path / "out"), "--only", "family,shapes-own"]
    done = subprocess.run([*command, "--seeds", "1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_do_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import run

    first, second = (run.Series(tmp_path, tmp_path / "results", True) for _ in range(2))
    with first.alone("family-1"):
        with second.alone("family-2"):  # another run
            pass
        with pytest.raises(SystemExit) as stopped:
            second.do(RUNS["family"], 1)
        assert stopped.value.code == 2 and "family-1: another process does it in" in capsys.readouterr().err
    with second.alone("family-1"):
        pass
    assert not (tmp_path / "work" / "family-1").exists()


def assert_children_are_explored_and_mended(out: Path) -> None:
    """`exploring.py` and `between.py`, of the second parent's first seed."""
    for script, *words in (("exploring", "--budgets", "small"), ("between",)):
        command = [sys.executable, str(FOLDER / f"{script}.py"), "--out", str(out), "--quick", "--seeds", "4", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    results = out / "quick" / "results"
    explored = json.loads((results / "exploring" / "small-4.json").read_text())
    (tried,) = explored["candidates"]
    assert tried["subnet"] == explored["best"] and tried["tokens"] == 2 * 2048 and tried["cpu"] > 0
    between = json.loads((results / "between" / "4.json").read_text())["children"]
    assert list(between) == ["b60"] and between["b60"]["between"] != between["b60"]["touched"]["10"]


@pytest.mark.slow
def test_the_series_runs_and_does_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(out), "--quick", "--jobs", "1"]
    parts = {
        "4": "family,alone-small,greedy-family,race-family",
        "1": "scratch-small,mamba-flat,shapes-random-1",
        "7": "greedy-family",
        "8": "greedy-family",  # scored by Megatron
    }
    for seed, names in parts.items():
        done = subprocess.run([*command, "--seeds", seed, "--only", names], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    files = {path.stem: json.loads(path.read_text()) for path in (out / "quick" / "results").glob("*.json")}
    first, second, third, fourth = (files.pop(f"parent-{number}")["sha256"] for number in PARENTS)
    assert set(files) == {f"{name}-{seed}" for seed, names in parts.items() for name in names.split(",")}
    assert {files[f"{name}-4"]["parent_sha256"] for name in parts["4"].split(",")} == {second} != {first}
    assert files["greedy-family-7"]["parent_sha256"] == third not in (first, second)
    assert files["greedy-family-8"]["parent_sha256"] == fourth not in (first, second, third)
    assert files["mamba-flat-1"]["parent_sha256"] == first != files["scratch-small-1"]["parent_sha256"]
    assert files["alone-small-4"]["subnets"]["small"] == files["family-4"]["subnets"]["small"]
    assert files["family-4"]["curve"][-1]["cpu"] > 0 and set(files["family-4"]["score"]) == set(BUDGETS)
    assert_children_are_explored_and_mended(out)
    again = subprocess.run([*command, "--seeds", "4", "--only", parts["4"]], capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count(" s {") == 0
