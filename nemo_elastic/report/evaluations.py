"""Scores of lm-evaluation-harness, from the folder that its `--output_path` named: `results_*.json`, at any depth.

The harness writes one file per model and call, with the path of the model as it was given. Only RUN/hf/NAME and
RUN/children/NAME are the run's own child NAME; any other model, a rival's `hf/NAME` too, has a row of its own under its
whole path. Of two files about the same model and task the later one counts.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError

FOLDER, FILES = "evaluations", "results_*.json"
CHILDREN = ("hf", "children")  # folders of a run that hold its children
STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one model.

    Attributes:
        model: its path, or the name that a hub knows it by, as the harness was given it.
        child: the run's own child that it is; None for any other model.
        metric: the harness's own name (`acc`, `bits_per_byte`); `filter` is what it took of the answers.
        stderr: its standard error; None where the harness gives none.
        samples: documents that were asked; `shots`: examples in the prompt.
        version: the harness's.
    """

    model: str
    child: str | None
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    samples: int | None = None
    shots: int | None = None
    version: str = ""
    file: str = ""

    @property
    def column(self) -> tuple[str, str, str]:
        """What is compared between models."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True)
class Row:
    """A budget, or another model (`budget` is None) by its whole path, and its score per column."""

    budget: str | None
    model: str
    scores: list[Score | None]


def read_evaluations(folder: Path, run: Path) -> tuple[tuple[Score, ...], list[Problem]]:
    """(scores by model and column, what could not be read).

    Args:
        run: the run folder whose children are meant.

    Raises:
        ProblemsError: `folder` holds no results of the harness.
    """
    files = sorted(folder.rglob(FILES), key=lambda path: (path.name, str(path)))  # the name ends with the time
    if not files:
        what = "holds no" if folder.is_dir() else "is no folder with"
        words = f"{what} {FILES}; give the --output_path of `lm_eval` (docs/training.md, Evaluation)"
        raise ProblemsError([Problem(str(folder), words)])
    found: dict[tuple[str | None, str, tuple[str, str, str]], Score] = {}
    problems = []
    for path in files:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            scores = list(_scores(results, path, run))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            words = f"is no results file of lm-evaluation-harness ({type(error).__name__}: {error}); it was left out"
            problems.append(Problem(str(path.relative_to(folder)), words))
            continue
        found.update({(s.child, "" if s.child else s.model, s.column): s for s in scores})
    return tuple(found.values()), problems


def _scores(results: Mapping[str, Any], path: Path, run: Path) -> Iterable[Score]:
    model, changed = _model(results)
    child = None if changed else _child(model, path, run)
    for task, values in results["results"].items():
        better = (results.get("higher_is_better") or {}).get(task) or {}
        asked = (results.get("n-samples") or {}).get(task) or {}
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith(STDERR) or not _is_number(value):
                continue  # `alias`, `sample_len`, a standard error, "N/A"
            stderr = values.get(f"{metric}{STDERR},{filter}")
            yield Score(
                model=f"{model} with {changed}" if changed else model,
                child=child,
                task=task,
                metric=metric,
                filter=filter,
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                higher_is_better=better.get(metric),
                samples=asked.get("effective"),
                shots=(results.get("n-shot") or {}).get(task),
                version=str(results.get("lm_eval_version") or ""),
                file=path.name,
            )


def _model(results: Mapping[str, Any]) -> tuple[str, str]:
    """(`runs/mine/hf/small` of `pretrained=runs/mine/hf/small/,dtype=float32`, what was put on top: an adapter)."""
    arguments = (results.get("config") or {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(word.strip().partition("=")[::2] for word in arguments.split(","))
    name = arguments.get("pretrained") or arguments.get("model") or results["model_name"]
    changed = ", ".join(f"{key}={arguments[key]}" for key in ("peft", "delta") if arguments.get(key))
    return os.path.normpath(str(name)), changed


def _child(model: str, file: Path, run: Path) -> str | None:
    """The child NAME of `run` that lies at `model`, or None.

    The harness does not say from where it was run: a relative path is taken from here. Where nothing lies there, it is
    taken from any folder above the child, and that only of a results file inside the run.
    """
    here, run = os.path.realpath(model), Path(os.path.realpath(run))
    name = Path(model).name
    own = [run / folder / name for folder in CHILDREN]
    if any(here == os.path.realpath(child) for child in own):
        return name
    parts = Path(model).parts
    unknown = not os.path.isabs(model) and not os.path.exists(here) and Path(os.path.realpath(file)).is_relative_to(run)
    return name if unknown and len(parts) > 1 and any(child.parts[-len(parts) :] == parts for child in own) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def columns(scores: Iterable[Score]) -> list[tuple[str, str, str]]:
    """(task, metric, filter) of every score, sorted."""
    return sorted({score.column for score in scores})


def rows(scores: Iterable[Score], budgets: Sequence[str]) -> list[Row]:
    """The budgets in their order, evaluated or not, then other models by their path."""
    scores = list(scores)
    of_budget = {(s.child, s.column): s for s in scores if s.child in budgets}
    others = {(s.model, s.column): s for s in scores if s.child not in budgets}
    wanted = columns(scores)
    found = [Row(name, name, [of_budget.get((name, column)) for column in wanted]) for name in budgets]
    names = sorted({model for model, _ in others})
    return found + [Row(None, name, [others.get((name, column)) for column in wanted]) for name in names]
