"""The package as Python functions: what the verbs and the NeMo-Run recipes call, and what a script may.

    from nemo_elastic.nemo import api
    nested = api.train("conf/my_parent.yaml", "runs/mine", overrides=["train.tensor_model_parallel_size=8"])

Under torchrun every process calls the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_elastic.config import Resolved, load_config
from nemo_elastic.family import Configured
from nemo_elastic.importance.store import Importance
from nemo_elastic.mcore.runtime.one_run import one_run
from nemo_elastic.nemo.pipeline import Progress, Run, quickstart
from nemo_elastic.nemo.run.start_checks import check_rank, check_train
from nemo_elastic.processes.launchers import started_processes

__all__ = ["Finished", "quickstart", "rank", "resolved_run", "train"]


@dataclass(frozen=True)
class Finished:
    """What `train` leaves."""

    nested: Path
    heldout_losses: dict[str, float]
    tokens: dict[str, int]


def resolved_run(
    config: str | Path | Resolved | Configured,
    out: str | Path | None,
    overrides: Sequence[str],
    progress: Progress | None,
    *,
    begins: bool = False,
) -> Run:
    """A run folder's steps for a configuration (file, shipped name, or already resolved); `begins`: a new run."""
    if not isinstance(config, Configured):
        config = Configured(config if isinstance(config, Resolved) else load_config(config, list(overrides)))
    return Run(config, Path(out) if out else Path("runs") / config.config.name, progress, begins=begins)


def rank(
    config: str | Path | Resolved | Configured,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Importance:
    """Importance of widths and layers -> `OUT/importance/`.

    Raises:
        ProblemsError: anything wrong with configuration, layout or parent.
    """
    run = resolved_run(config, out, overrides, progress)
    check_rank(run.configured, run.out, started_processes(), once=True)
    return run.importance(resume=resume)


def train(
    config: str | Path | Resolved | Configured,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Finished:
    """The elastic run, from a parent to `OUT/nested`; ranks and sorts first when that is missing.

    Raises:
        ProblemsError: anything wrong with configuration, layout, parent, or a run folder that is in use.
    """
    run = resolved_run(config, out, overrides, progress, begins=not resume)
    check_train(run.configured, run.out, started_processes(), resume=resume, force=force)
    run.start()
    with one_run(run.out):
        if force:
            run.clear()
        run.write_config()
        importance = run.importance(resume=resume)
        sorted_folder = run.sort(importance)
        run.search_shapes(importance, sorted_folder)
        trained = run.train(sorted_folder, resume_from=run.resume_point() if resume else None)
        nested = run.nest(force=force or resume)
    return Finished(nested, trained.heldout_losses, trained.tokens)
