"""Scores of lm-evaluation-harness, from the folder that its `--output_path` named: `results_*.json`, at any depth.

The harness writes one file per model and call. Which budget a file is of, the model's own folder says: `.../hf/small`
is `small`; a model that is no budget of the run (the parent, say) keeps its folder's name. Of two files about the same
model and task the later one counts.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError

FOLDER, FILES = "evaluations", "results_*.json"
STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one model.

    Attributes:
        model: a budget's name, or the folder's name of another model.
        metric: the harness's own name (`acc`, `bits_per_byte`); `filter` is what it took of the answers.
        stderr: its standard error; None where the harness gives none.
        samples: documents that were asked; `shots`: examples in the prompt.
        version: the harness's.
    """

    model: str
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


def read_evaluations(folder: Path) -> tuple[tuple[Score, ...], list[Problem]]:
    """(scores by model and column, what could not be read).

    Raises:
        ProblemsError: `folder` holds no results of the harness.
    """
    files = sorted(folder.rglob(FILES), key=lambda path: (path.name, str(path)))  # the name ends with the time
    if not files:
        what = "holds no" if folder.is_dir() else "is no folder with"
        words = f"{what} {FILES}; give the --output_path of `lm_eval` (docs/training.md, Evaluation)"
        raise ProblemsError([Problem(str(folder), words)])
    found: dict[tuple[str, tuple[str, str, str]], Score] = {}
    problems = []
    for path in files:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            scores = list(_scores(results, path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            words = f"is no results file of lm-evaluation-harness ({type(error).__name__}: {error}); it was left out"
            problems.append(Problem(str(path.relative_to(folder)), words))
            continue
        found.update({(score.model, score.column): score for score in scores})
    return tuple(found.values()), problems


def _scores(results: Mapping[str, Any], path: Path) -> Iterable[Score]:
    model = _model_folder(results)
    for task, values in results["results"].items():
        better = (results.get("higher_is_better") or {}).get(task) or {}
        asked = (results.get("n-samples") or {}).get(task) or {}
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith(STDERR) or not _is_number(value):
                continue  # `alias`, `sample_len`, a standard error, "N/A"
            stderr = values.get(f"{metric}{STDERR},{filter}")
            yield Score(
                model=model,
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


def _model_folder(results: Mapping[str, Any]) -> str:
    """The last name of the model's path: `pretrained=runs/mine/hf/small,dtype=float32` -> `small`."""
    arguments = (results.get("config") or {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(word.partition("=")[::2] for word in arguments.split(","))
    name = arguments.get("pretrained") or arguments.get("model") or results["model_name"]
    return Path(str(name).rstrip("/")).name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def columns(scores: Iterable[Score]) -> list[tuple[str, str, str]]:
    """(task, metric, filter) of every score, sorted."""
    return sorted({score.column for score in scores})


def rows(scores: Iterable[Score], budgets: Sequence[str]) -> list[tuple[str, list[Score | None]]]:
    """(model, a score per column): the budgets in their order, evaluated or not, then other models by name."""
    scores = list(scores)
    by_key, wanted = {(s.model, s.column): s for s in scores}, columns(scores)
    others = sorted({s.model for s in scores} - set(budgets))
    return [(model, [by_key.get((model, column)) for column in wanted]) for model in (*budgets, *others)]
