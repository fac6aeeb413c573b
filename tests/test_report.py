"""The report of a run: what a made-up run folder holds is what page, CSV and terminal say; what is missing is named."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import (
    PARENT_LOSS,
    RANKING,
    depth_score,
    heldout,
    probabilities,
    train_record,
    width_score,
    write_run,
)

from nemo_elastic.cli.main import main
from nemo_elastic.problems import ProblemsError
from nemo_elastic.report import write
from nemo_elastic.report.drawing import spread
from nemo_elastic.report.palette import DARK, LIGHT
from nemo_elastic.report.router_figures import probability_series
from nemo_elastic.report.run_folder import read_run
from nemo_elastic.report.table import results_table
from nemo_elastic.report.width_figures import sorted_shares, width_scores
from nemo_elastic.report.write import write_report

FIGURES = {"children", "loss", "pareto", "layer_importance", "width_importance", "router"}
FIGURES |= {"router_probabilities", "choices", "sources", "throughput"}
SHEETS = {"budgets", "validation", "train", "router", "layer_importance", "children", "timings", "sources", "planned"}
VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Text of a page, its attributes, and a check that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words)).replace("\u200b", "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, verified run and its report."""
    out = write_run(tmp_path_factory.mktemp("finished"))
    write_report(out)
    return out


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: drawing takes seconds."""
    monkeypatch.setattr(write, "figures", lambda run, rows: iter(()))


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return (finished / "report" / "report.html").read_text(encoding="utf-8")


def rows_of(out: Path, name: str) -> list[dict[str, str]]:
    with (out / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_run_gives_every_file_and_nothing_missing(finished: Path, page: str) -> None:
    files = {path.name for path in (finished / "report").iterdir()}
    assert files == {"report.html"} | {f"{n}.png" for n in FIGURES} | {f"{n}.csv" for n in SHEETS}
    for name in FIGURES:
        assert (finished / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert 'id="missing"' not in page
    assert read_run(finished).missing == ()


def test_the_page_stands_alone(page: str) -> None:
    parsed = Page(page)
    assert not re.search(r"(https?:|//[a-z]|file:)", page)
    assert {tag for tag, _, _ in parsed.attributes} & {"script", "link", "img", "iframe", "object"} == set()
    references = [value for _, key, value in parsed.attributes if key in ("src", "href", "xlink:href")]
    beside = [value for tag, _, value in parsed.attributes if (tag, _) == ("a", "href") and not value.startswith("#")]
    assert set(beside) == {f"{n}.png" for n in FIGURES} | {f"{n}.csv" for n in SHEETS}
    references = [value for value in references if value not in beside] + re.findall(r"url\(([^)]*)\)", page)
    ids = [value for _, key, value in parsed.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert all(r.startswith("#") and r[1:] in ids for r in references)
    assert "@import" not in page


def test_figures_take_every_colour_from_the_theme(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert drawn.count("<svg") == len(FIGURES)
    assert re.findall(r"#[0-9a-fA-F]{6}\b", drawn) == []
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", drawn)) <= {*LIGHT, "font"}
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("paper", [LIGHT, DARK])
def test_text_colours_are_readable_on_their_paper(paper: dict[str, str]) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in ("ink", "muted", "good", "bad", *(f"budget-{i}" for i in range(6))):
        light, dark = sorted((luminance(paper[name]), luminance(paper["paper"])), reverse=True)
        minimum = 3.0 if name.startswith("budget") else 4.5  # bold labels; running text (WCAG 2.1)
        assert (light + 0.05) / (dark + 0.05) >= minimum, name


def test_every_number_of_the_results_is_on_the_page(finished: Path, page: str) -> None:
    text, results = Page(page).text, json.loads((finished / "results.json").read_text())
    assert f"{PARENT_LOSS:.4f}" in text
    assert f"{results['parent']['parameters']:,}" in text
    for entry in results["budgets"]:
        assert entry["name"] in text
        assert f"{entry['parameters']:,}" in text
        assert f"{entry['percent_of_parent']:.2f}%" in text
        assert f"{entry['memory_bytes']['total'] / 1e6:.4g} MB" in text
        for key in ("heldout_before", "heldout_nested", "heldout_child"):
            assert f"{entry[key]:.4f}" in text
    small = results["budgets"][2]["subnet"]
    assert [small["hidden_size"], small["mamba_num_heads"], small["num_layers"]] == [96, 12, 12]
    assert "96 128-512 12 16 8 12" in text
    for words in ("3 min 07 s", "0123abc", "verified: largest difference 1e-07", "300 of 300 steps", "614,400"):
        assert words in text
    assert "run again" not in text  # the configuration has its own place


def test_validation_and_train_sheets_are_the_logs(finished: Path) -> None:
    validation = rows_of(finished, "validation")
    assert [(int(r["step"]), r["budget"]) for r in validation] == [
        (step, name) for step in range(0, 301, 25) for name in ("full", "large", "small")
    ]
    assert all(float(r["heldout_loss"]) == heldout(r["budget"], int(r["step"])) for r in validation)
    assert all(int(r["tokens"]) == 2048 * int(r["step"]) for r in validation)
    train = rows_of(finished, "train")
    assert len(train) == 150 * 3 + 150 * 2
    for row in train:
        logged = train_record(int(row["step"]))
        budget = logged["budgets"][row["budget"]]
        assert (float(row["kd"]), float(row["ce"])) == (budget["kd"], budget["ce"])
        assert (int(row["tokens_of_step"]), row["phase"]) == (budget["tokens"], logged["phase"])
        assert int(row["tokens"]) == 2048 * int(row["step"])


def test_sheets_of_layers_router_and_budgets_are_exact(finished: Path) -> None:
    layers = rows_of(finished, "layer_importance")
    assert [float(r["score"]) for r in layers] == [depth_score(layer) for layer in range(16)]
    assert [RANKING[int(r["rank"]) - 1] for r in layers] == list(range(16))
    assert [int(r["layer"]) for r in layers if r["kept_small"] == "false"] == sorted(RANKING[12:])
    assert [r["kind"] for r in layers[:2]] + [layers[5]["kind"]] == ["mamba", "mlp", "attention"]
    cells = [r for r in rows_of(finished, "children") if r["budget"] == "small"]
    kept = {int(r["layer"]): r for r in cells if r["kept"] == "true"}
    assert sorted(kept) == sorted(RANKING[:12])
    assert [kept[layer]["ffn_hidden_size"] for layer in (1, 3, 6, 10, 15)] == ["512", "384", "384", "256", "256"]
    assert {r["mamba_num_heads"] for r in kept.values()} == {"12", ""}
    router = rows_of(finished, "router")
    assert len(router) == 2 * 120
    assert float(router[1]["argmax_error"]) == train_record(61)["router"]["small"]["argmax_error"]
    results = json.loads((finished / "results.json").read_text())
    for row, entry in zip(rows_of(finished, "budgets"), results["budgets"], strict=True):
        assert int(row["parameters"]) == entry["parameters"]
        assert float(row["heldout_child"]) == entry["heldout_child"]
        assert row["layers"] == " ".join(map(str, entry["subnet"]["layers"]))
    assert rows_of(finished, "timings")[1] == {"phase": "train", "part_of": "", "seconds": "187.25"}


def test_the_load_of_experts_is_drawn_and_written(tmp_path: Path) -> None:
    """Shares of the mean over the experts that a budget keeps; a run without experts has neither figure nor sheet."""
    out = write_run(tmp_path, steps=25)
    path = out / "logs" / "train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {"small": {"tokens": {"1": [6, None, 2, None], "3": [3, 3, 0, 2]}, "busiest": 1.5, "idle": 0.125}}
    lines[9]["expert_load"] = {"full": {"tokens": {"1": [1, 1, 1, 1]}, "busiest": 1.0, "idle": 0.0}, **rows}
    lines[19]["expert_load"] = rows
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(write_report(out).read_text(encoding="utf-8")).text
    assert "Load of experts" in text and (out / "report" / "expert_load.png").is_file()
    found = rows_of(out, "expert_load")
    assert [r["step"] for r in found] == ["10"] * 10 + ["20"] * 6
    last = [(r["budget"], r["layer"], r["expert"], r["tokens"], r["over_mean"]) for r in found[-6:-3]]
    assert last == [("small", "1", "0", "6", "1.5"), ("small", "1", "2", "2", "0.5"), ("small", "3", "0", "3", "1.5")]


def test_the_same_run_gives_the_same_bytes(finished: Path) -> None:
    folder = finished / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report(finished)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_in_progress_is_reported_from_its_logs(tmp_path: Path, finished: Path) -> None:
    out = write_run(tmp_path, steps=150, results=False, importance=False)
    with (out / "logs" / "train.jsonl").open("a") as file:
        file.write('{"step": 151, "phase": "hard", "budg')
    with (out / "logs" / "validation.jsonl").open("a") as file:
        file.write('{"step": 175, "losses": {"full": 2.')
    text = Page(write_report(out).read_text(encoding="utf-8")).text
    assert "150 of 300 are done" in text
    assert "results.json not there" in text
    assert "importance/importance.json not there" in text
    assert "not verified yet" in text
    assert not (out / "report" / "layer_importance.png").exists()
    assert (out / "report" / "pareto.png").exists()
    assert max(int(r["step"]) for r in rows_of(out, "train")) == 150
    exact = {r["name"]: r["parameters"] for r in rows_of(finished, "budgets")}
    for row in rows_of(out, "budgets"):  # counted here, not read: the arithmetic's result is what verify measured
        assert row["parameters"] == exact[row["name"]]
        assert float(row["heldout_nested"]) == heldout(row["name"], 150)
        assert (row["heldout_child"], row["source"]) == ("", "log")


@pytest.mark.parametrize("part", ["config.json", "results.json", "importance/importance.json"])
@pytest.mark.parametrize("content", ['{"torn": ', "[1, 2]", None])
@pytest.mark.usefixtures("no_figures")
def test_a_torn_or_missing_part_is_named(tmp_path: Path, part: str, content: str | None) -> None:
    out = write_run(tmp_path, steps=50)
    if content is None:
        (out / part).unlink()
    else:
        (out / part).write_text(content)
    assert part in [problem.key for problem in read_run(out).missing]
    if content != "[1, 2]":
        assert part in Page(write_report(out).read_text(encoding="utf-8")).text


@pytest.mark.parametrize("only", ["config.json", "results.json", "importance", "logs"])
def test_one_part_alone_makes_a_report(tmp_path: Path, only: str) -> None:
    whole, out = write_run(tmp_path / "whole", steps=50), tmp_path / "part"
    out.mkdir()
    (whole / only).rename(out / only)
    text = Page(write_report(out).read_text(encoding="utf-8")).text
    assert "Not in this run yet" in text
    assert ("Layer importance" in text) == (only == "importance")
    assert ("Loss per budget" in text) == (only == "logs")


def test_losses_that_are_not_finite_are_shown_not_raised(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps=50, results=False)
    path = out / "logs" / "validation.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[-1]["losses"] = {"full": PARENT_LOSS, "large": float("nan"), "small": float("inf")}
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    text = Page(write_report(out).read_text(encoding="utf-8")).text
    assert "nan" in text
    assert "inf" in text
    assert (out / "report" / "loss.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_names_are_escaped(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps=25)
    path = out / "results.json"
    results = json.loads(path.read_text())
    results["budgets"][0]["name"] = "<script>alert(1)</script> & co"
    results["provenance"]["git"] = "<b>bold</b>"
    path.write_text(json.dumps(results))
    text = write_report(out).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>bold" not in text
    assert "<script>alert(1)</script> & co" in Page(text).text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ProblemsError, match=r"is no run folder: none of config\.json"):
        write_report(tmp_path)
    with pytest.raises(ProblemsError, match="is no folder"):
        write_report(tmp_path / "absent")
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_figures")
def test_the_verb_writes_and_says_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = write_run(tmp_path, steps=50, importance=False)
    assert main(["report", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["report"] == str(out / "report" / "report.html")
    assert said["files"] == sorted(
        ["report.html", *(f"{name}.csv" for name in SHEETS - {"layer_importance", "router"})]
    )
    assert [words.partition(":")[0] for words in said["missing"]] == ["importance/importance.json", "training steps"]


def test_the_terminal_table_has_every_number(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(results_table(results))
    lines = {words[0]: words[1:] for words in map(str.split, capture.get().splitlines()) if words}
    costs = {e["name"]: [f"{e['parameters']:,}", f"{e['percent_of_parent']:.2f}"] for e in results["budgets"]}
    assert lines["parent"] == ["128", "512", "16", "16", "16", *costs["full"], "-", "-", "2.3456"]
    assert lines["large"] == ["112", "384", "16", "12", "15", *costs["large"], "2.4042", "2.4042", "3.2456"]
    assert lines["small"] == ["96", "128-512", "12", "8", "12", *costs["small"], "2.5692", "2.5692", "5.7456"]


def test_the_terminal_table_knows_what_is_not_known() -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(results_table({"budgets": [{"name": "half", "verified": False, "heldout_nested": 2.5}]}))
    half = next(line for line in capture.get().splitlines() if "half" in line)
    assert half.split() == ["half", "-", "-", "2.5000", "-", "-", "NO"]


@pytest.mark.parametrize("places", [[0.5, 0.5, 0.5], [0.0, 0.01, 0.02], [0.99, 1.0, 0.2], [-3.0, 0.5], []])
def test_labels_are_moved_apart_and_stay_inside(places: list[float]) -> None:
    moved = spread(places, 0.1)
    order = sorted(range(len(places)), key=lambda i: places[i])
    gaps = [moved[b] - moved[a] for a, b in pairwise(order)]
    assert all(gap >= 0.1 - 1e-3 for gap in gaps)
    assert all(-1e-3 <= p <= 1 + 1e-3 for p in moved)


def test_width_scores_are_read_as_written_and_sorted(finished: Path, tmp_path: Path) -> None:
    scores = width_scores(read_run(finished))
    assert {dim: len(layers) for dim, layers in scores.items()} == {
        "hidden_size": 17, "ffn_hidden_size": 7, "mamba_num_heads": 7, "mamba_head_dim": 7, "num_attention_heads": 2
    }  # fmt: skip
    assert scores["mamba_num_heads"][4].tolist() == [width_score(4, unit) for unit in range(16)]
    shares = sorted_shares(scores["mamba_num_heads"])
    assert shares[0].tolist() == [100 * n / 16 for n in range(16, 0, -1)]
    torn = write_run(tmp_path, steps=25)
    (torn / "importance" / "importance.safetensors").write_bytes(b"torn")
    assert width_scores(read_run(torn)) == {}


def test_probabilities_are_means_over_layers_at_the_logged_steps(finished: Path) -> None:
    series = probability_series(read_run(finished))
    assert set(series) == {"large", "small"}
    assert [step for step, _ in series["small"]["hidden_size"]] == list(range(70, 181, 10))
    for step, found in series["large"]["hidden_size"]:
        assert found == probabilities(step, 1)["hidden_size"][0]
    assert series["small"]["ffn_hidden_size"][-1][1] == [0.0, 0.5, 0.5, 0.0]


@pytest.mark.usefixtures("no_figures")
def test_baselines_are_read_and_wrong_ones_are_named(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps=25)
    good = {"kind": "scratch", "budget": "small", "parameters": 10, "heldout_loss": 3.0}
    points = [good, good | {"kind": "guess"}, good | {"heldout_loss": "3"}, {"kind": "scratch"}]
    (out / "baselines.json").write_text(json.dumps({"format": 1, "points": points}))
    run = read_run(out)
    assert [point.words for point in run.baselines] == ["small from scratch"]
    wrong = [p.key for p in run.missing if p.key.startswith("baselines")]
    assert wrong == [f"baselines.json: points.{i}" for i in (1, 2, 3)]
    (out / "baselines.json").write_text("[]")
    assert "baselines.json must be a mapping" in Page(write_report(out).read_text(encoding="utf-8")).text


def test_baselines_are_drawn(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps=25)
    point = {"budget": "small", "parameters": 1_300_000, "heldout_loss": 3.0, "note": "as many tokens"}
    points = [point | {"kind": kind} for kind in ("zero_shot", "distilled_alone", "scratch")]
    (out / "baselines.json").write_text(json.dumps({"format": 1, "points": points}))
    page = write_report(out).read_text(encoding="utf-8")
    for words in ("zero-shot", "distilled alone", "from scratch"):
        assert f"small {words}: 3.0000 (as many tokens)" in page
