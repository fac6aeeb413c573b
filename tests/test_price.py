"""What shapes cost to find, in the small reproduction: the rows of the page from numbers, and the committed files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "paper_small"
sys.path.insert(0, str(FOLDER))

SUBNET, OTHER = {"hidden_size": 192}, {"hidden_size": 168}


def run(name: str, losses: dict[str, float], tokens: dict[str, int], cpu: float, subnet: Any = SUBNET) -> Any:
    curve = [{"step": 0, "tokens": tokens, "losses": losses, "cpu": cpu}]
    subnets = dict.fromkeys(losses, subnet)
    return {
        "name": name,
        "curve": curve,
        "subnets": subnets,
        "score": {n: {"heldout_loss": v} for n, v in losses.items()},
    }


def found(best: Any = SUBNET) -> dict[str, Any]:
    """Two candidates of 50 tokens and 10 seconds each, and one that does not count."""
    one = {"tokens": 50, "cpu": 10.0, "spare": False, "subnet": best}
    shapes = [{**one, "damage": d, "before": b, "after": a, "spare": s} for d, b, a, s in
              ((0.1, 2.0, 1.5, False), (0.2, 2.5, 1.4, False), (0.3, 2.2, 1.6, True))]  # fmt: skip
    return {"best": best, "near": 8, "measuring_cpu": 4.0, "candidates": shapes}


def family(loss: float) -> Any:
    """Of two children, 100 tokens each and of the full member."""
    members = ("full", "large", "small")
    return run("race-family", dict.fromkeys(members, loss), dict.fromkeys(members, 100), 60.0)


def alone(subnet: Any = SUBNET, prefix: str = "greedy") -> dict[tuple[str, int], Any]:
    """100 tokens end at 3 in 20 seconds, 400 at 1 in 80."""
    runs = {}
    for child in ("large", "small"):
        runs[f"{prefix}-alone-{child}", 4] = run(f"{prefix}-alone-{child}", {child: 3.0}, {child: 100}, 20.0, subnet)
        runs[f"{prefix}-whole-{child}", 4] = run(f"{prefix}-whole-{child}", {child: 1.0}, {child: 400}, 80.0, subnet)
    return runs


def results(loss: float, runs: Any, best: Any = SUBNET) -> Any:
    from readings import Results

    explored = {(child, 4): found(best) for child in ("large", "small")}
    return Results({("race-family", 4): family(loss), **runs}, {}, explored)


def test_exploring_measuring_and_distilling_are_added_up() -> None:
    """Loss 2 takes 200 tokens, on the line in the logarithm, at 0.2 seconds each; the spare shape costs nobody."""
    from price import price

    (row,) = price(results(2.0, alone()))
    assert (row["children"], row["seeds"]) == ("2", "4")
    assert row["ratio_tokens"] == f"{(2 * 100 + 2 * 200) / 300:.2f} (1 seed)"
    assert row["given_tokens"] == f"{2 * 200 / 300:.2f} (1 seed)"
    assert (row["measuring_cpu"], row["exploring_cpu"], row["distilling_cpu"]) == ("8", "40", "80")
    family = 60 + 2 * 17 * 0.5  # a race measures 17 shapes a budget at most, at half a second each
    assert row["ratio_cpu"] == f"{(8 + 40 + 80) / family:.2f} (1 seed)"
    assert row["few_tokens"] == row["given_tokens"]  # only one of the two would start, and it has nobody to beat


def test_what_a_race_would_start_is_explored_alone() -> None:
    """Losses over the parent's of 0.5 and 0.55: within 1.2 times the least."""
    from price import price

    close = results(2.0, alone())
    for one in close.explored.values():
        one["candidates"][1]["before"] = 2.05
    close.runs["race-family", 4]["curve"][0]["losses"]["full"] = 1.5
    (row,) = price(close)
    assert row["few_tokens"] == row["ratio_tokens"] == "2.00 (1 seed)"


def test_a_loss_that_alone_is_not_reached_is_a_bound() -> None:
    from price import price

    (row,) = price(results(0.5, alone()))
    assert row["ratio_tokens"] == f"more than {(200 + 800) / 300:.2f}"


def test_only_runs_of_the_shape_that_was_chosen_count() -> None:
    from price import price

    assert price(results(2.0, alone(), best=OTHER)) == []
    assert price(results(2.0, {**alone(), **alone(OTHER, "explored")}, best=OTHER))[0]["exploring_cpu"] == "40"


def test_estimates_are_compared_by_rank() -> None:
    from price import predicted, rank_correlation

    row = predicted(results(2.0, alone()))[0]
    assert (row["shapes"], row["near"]) == ("3", "2")
    assert row["damage"] == "0.50" and row["before_near"] == "-1.00"
    shapes = [{"damage": d, "after": a} for d, a in ((1, 10), (2, 100), (3, 1000))]
    assert rank_correlation(shapes, "damage") == pytest.approx(1)


@pytest.mark.parametrize("file", sorted((FOLDER / "results" / "exploring").glob("*.json")), ids=lambda path: path.stem)
def test_what_was_explored_is_what_the_page_says(file: Path) -> None:
    from exploring import ABOVE, BELOW, KEPT, STEPS

    one = json.loads(file.read_text())
    assert file.stem == f"{one['budget']}-{one['seed']}"
    tried = [shape for shape in one["candidates"] if not shape["spare"]]
    assert len(tried) == KEPT <= one["near"] and all(s["tokens"] == STEPS * 2048 for s in one["candidates"])
    assert all(-BELOW <= shape["error"] <= ABOVE for shape in one["candidates"])
    before = [shape["before"] for shape in one["candidates"]]
    assert before == sorted(before) and min(tried, key=lambda shape: shape["after"])["subnet"] == one["best"]
