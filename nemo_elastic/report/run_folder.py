"""A run folder as it stands: whatever is there is read, whatever is not is named with what makes it.

A run may be in progress, interrupted, or only ranked; half-written files count as missing, never as errors. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.load import load_values
from ..config.sections import ReportConfig, RunConfig
from ..cost.conditions import byte_profile
from ..cost.counts import active_parameters, memory, parameters
from ..family import Family, family_of
from ..files import read_json
from ..problems import Problem, ProblemsError
from ..processes.runlog import RunLog
from ..processes.zero_shot import read_zero_shot
from ..space.architecture import Architecture
from ..space.dims import DEFAULT_FFN_GROUPS
from ..space.elastic_space import ElasticSpace
from ..space.layout import ParamLayout
from ..space.subnet import Subnet
from .baselines import Baseline, read_baselines
from .evaluations import FILES, Score, read_evaluations
from .evaluations import FOLDER as EVALUATIONS

CONFIG, LOGS, IMPORTANCE, RESULTS = "config.json", "logs", "importance/importance.json", "results.json"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Everything a report is made of.

    Attributes:
        values, origins: the resolved configuration and where each value came from; empty when there is none.
        train, validation, race, fallback, saves, sessions: log records by step; a session is a start or a resume.
        zero_shot: what the final children lose before training.
        importance: the description that `rank` wrote.
        results: what `verify` or `quickstart` wrote.
        baselines: models outside the family to compare with.
        evaluations: scores of lm-evaluation-harness.
        missing: key: what is not there; message: what that means and how to get it.
    """

    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    config: RunConfig | None = None
    train: tuple[Mapping[str, Any], ...] = ()
    validation: tuple[Mapping[str, Any], ...] = ()
    race: tuple[Mapping[str, Any], ...] = ()
    fallback: tuple[Mapping[str, Any], ...] = ()
    saves: tuple[Mapping[str, Any], ...] = ()
    sessions: tuple[Mapping[str, Any], ...] = ()
    zero_shot: Mapping[str, Any] = field(default_factory=dict)
    importance: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[Problem, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    evaluations: tuple[Score, ...] = ()

    @property
    def title(self) -> str:
        """The report's title: `report.title`, else the run's name, else the folder's."""
        return self.conditions.title or (self.config.name if self.config else self.folder.resolve().name)

    @property
    def conditions(self) -> ReportConfig:
        """Serving conditions of memory figures."""
        return self.config.report if self.config else ReportConfig()

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole curriculum, when the configuration says."""
        steps = sum(stage.steps for stage in self.config.train.stages) if self.config else 0
        return steps or None

    @property
    def last_step(self) -> int | None:
        """The last step that left a record."""
        return max((r["step"] for r in (*self.train[-1:], *self.validation[-1:])), default=None)

    @property
    def resumes(self) -> list[int]:
        """Steps that were done when the run went on after an interruption."""
        return [session["step"] for session in self.sessions if session["step"]]

    @property
    def device(self) -> str | None:
        """The GPU it was trained on, or `cpu`; None where no log says."""
        return self.sessions[-1].get("device") if self.sessions else None

    @cached_property
    def family(self) -> Family | None:
        """The family of the configuration."""
        try:
            return family_of(self.config) if self.config else None
        except ProblemsError:
            return None

    @cached_property
    def architecture(self) -> Architecture | None:
        """The parent's sizes, from the configuration or from what `rank` wrote."""
        if self.family:
            return self.family.architecture
        try:
            return Architecture(**self.importance["architecture"])
        except (KeyError, TypeError, ProblemsError):
            return None

    @cached_property
    def layout(self) -> ParamLayout | None:
        """The table that counts parameters."""
        groups = self.config.elastic.groups if self.config else DEFAULT_FFN_GROUPS
        try:
            return ParamLayout(self.architecture, ffn_groups=groups) if self.architecture else None
        except ProblemsError:
            return None

    def subnet(self, values: Mapping[str, Any] | None) -> Subnet | None:
        """A logged subnet as an object (`{}`: the parent); None when it is absent or does not fit the parent."""
        if values is None or not self.layout:
            return None
        try:
            space = ElasticSpace(
                architecture=self.architecture,
                ffn_groups=self.layout.groups.ffn,
                expert_groups=self.layout.groups.experts,
            )
            return space.subnet_from_dict(values)
        except (ProblemsError, TypeError, ValueError):
            return None

    def parameters(self, subnet: Subnet) -> int:
        """Exact count of a child."""
        return parameters(self.layout, subnet)

    def active_parameters(self, subnet: Subnet) -> int:
        """Exact count of what one token meets of a child."""
        return active_parameters(self.layout, subnet)

    def memory_bytes(self, subnet: Subnet) -> float:
        """Bytes of one serving copy at the report's batch size, length and profile."""
        at = self.conditions
        profile = byte_profile(at.profile)
        return memory(
            self.layout, subnet, batch_size=at.batch_size, sequence_length=at.sequence_length, profile=profile
        ).total

    @property
    def budget_names(self) -> tuple[str, ...]:
        """Every budget that anything speaks of: the configuration's order first."""
        configured = list(self.config.elastic.budgets) if self.config else []
        of_results = [b["name"] for b in self.results.get("budgets", ()) if isinstance(b, Mapping) and "name" in b]
        logged = [name for record in self.validation for name in record.get("losses", {})]
        trained = [name for record in self.train for name in record.get("budgets", {})]
        return tuple(dict.fromkeys([*configured, *of_results, *logged, *trained]))


def read_run(folder: Path, evaluations: Path | None = None) -> RunFolder:
    """Read what `folder` holds; `evaluations`: results of lm-evaluation-harness (default: `folder/evaluations`).

    Raises:
        ProblemsError: nothing of a run is there, or no results in `evaluations`.
    """
    parts = (CONFIG, LOGS, IMPORTANCE, RESULTS)
    if not any((folder / part).exists() for part in parts):
        what = "is no folder" if not folder.is_dir() else f"is no run folder: none of {', '.join(parts)} is in it"
        words = f"{what}; give the folder that `nemo-elastic rank` or `train` wrote to"
        raise ProblemsError([Problem(str(folder), words)])
    missing: list[Problem] = []
    saved = _read_json(folder / CONFIG, "sizes, budgets and schedule are unknown; `train` writes it", missing)
    values = saved.get("values") if isinstance(saved.get("values"), Mapping) else {}
    config = _config(values, missing)
    importance = _read_json(folder / IMPORTANCE, "no layer importance; run `nemo-elastic rank`", missing)
    results = _read_json(
        folder / RESULTS,
        "children are not extracted and verified yet; run `nemo-elastic extract`, then `nemo-elastic verify`",
        missing,
    )
    log = RunLog(folder / LOGS)
    logs = {kind: _records(log, kind) for kind in ("train", "validation", "race", "fallback", "saves", "sessions")}
    train, validation = logs["train"], logs["validation"]
    if not train:
        missing.append(Problem("logs/train.jsonl", "no training step was logged; run `nemo-elastic train`"))
    if not validation:
        missing.append(Problem("logs/validation.jsonl", "no held-out loss was logged; run `nemo-elastic train`"))
    baselines, wrong = read_baselines(folder)
    missing += wrong
    scores: tuple[Score, ...] = ()
    if evaluations or any((folder / EVALUATIONS).rglob(FILES)):
        scores, wrong = read_evaluations(evaluations or folder / EVALUATIONS, folder)
        missing += wrong
    run = RunFolder(
        folder=folder,
        baselines=baselines,
        evaluations=scores,
        values=values,
        origins=saved.get("origins") or {},
        config=config,
        **logs,
        zero_shot=read_zero_shot(folder),
        importance=importance,
        results=results,
        missing=tuple(missing),
    )
    done, total = run.last_step, run.total_steps
    if done is None or total is None or done >= total:
        return run
    words = f"{done:,} of {total:,} are done (in progress or interrupted); go on with `nemo-elastic train --resume`"
    return replace(run, missing=(*run.missing, Problem("training steps", words)))


def _records(log: RunLog, kind: str) -> tuple[Mapping[str, Any], ...]:
    try:
        return tuple(log.read(kind))
    except (OSError, UnicodeDecodeError, KeyError, TypeError):
        return ()


def _config(values: Mapping[str, Any], missing: list[Problem]) -> RunConfig | None:
    if not values:
        return None
    try:
        return load_values(values)
    except ProblemsError as error:
        missing.append(Problem(CONFIG, f"does not fit this version ({error.problems[0]}); used as plain values only"))
        return None


def _read_json(path: Path, without: str, missing: list[Problem]) -> dict[str, Any]:
    name = str(path.relative_to(path.parents[1] if path.parent.name == "importance" else path.parent))
    try:
        found = read_json(path)
    except FileNotFoundError:
        missing.append(Problem(name, f"not there: {without}"))
        return {}
    except (OSError, ValueError) as error:
        missing.append(Problem(name, f"cannot be read ({error}): {without}"))
        return {}
    if not isinstance(found, dict):
        missing.append(Problem(name, f"is no mapping: {without}"))
        return {}
    return found
