"""`rank`, `sort`, `train`, `nest`, `quickstart`: the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_elastic.nemo.api.environment import on_first, own_processes
from nemo_elastic.nemo.api.results import Finished, Quickstart, Ranked
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any
from nemo_elastic.processes.progress import Progress
from nemo_elastic.verbs.given import Given, configured_of, run_folder

if TYPE_CHECKING:
    from nemo_elastic.nemo.pipeline import Run

TINY = "tiny_parent.yaml"


def resolved_run(
    config: Given, out: str | Path | None, overrides: Sequence[str], progress: Progress | None, *, begins: bool = False
) -> Run:
    """A run folder's steps for a configuration (file, shipped name, or already resolved); `begins`: a new run."""
    from nemo_elastic.nemo.pipeline import Run

    configured = configured_of(config, overrides)
    return Run(configured, run_folder(out, configured.config.name), on_first(progress), begins=begins)


def rank(
    config: Given,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Ranked:
    """Importance of widths and layers -> `OUT/importance/`.

    Args:
        resume: go on after an interruption, at the same layout.

    Raises:
        ProblemsError: anything wrong with configuration, layout or parent.
    """
    processes, configured = own_processes(), configured_of(config, overrides)
    out, heard = run_folder(out, configured.config.name), on_first(progress)
    from nemo_elastic.nemo.run.start_checks import check_rank

    check_rank(configured, out, processes)
    from nemo_elastic.nemo.pipeline import PHASES
    from nemo_elastic.nemo.run.ranking import FOLDER, rank_run

    importance = rank_run(
        configured, out, resume=resume, report=lambda phase, done, total: heard(PHASES[phase], done, total)
    )
    about = importance.provenance
    return Ranked(
        folder=out / FOLDER,
        depth_ranking=importance.depth_ranking,
        removed=tuple(about.get("removed", ())),
        seconds=about.get("seconds", 0.0),
        importance=importance,
    )


def sort(
    config: Given,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The parent with its units in order of importance -> `OUT/sorted/`, which is returned. Its function stays.

    Raises:
        ProblemsError: no scores, scores of another parent, or a folder that exists (without `force`) or that training
            checkpoints belong to.
    """
    own_processes()
    configured = configured_of(config, overrides)
    out = run_folder(out, configured.config.name)
    if any((out / "checkpoints").glob("step=*")):
        words = "has checkpoints that were trained from its sorted parent; choose another --out"
        raise ProblemsError([Problem(str(out), words)])
    from nemo_elastic.mcore.models.parents import open_parent, write_sorted
    from nemo_elastic.mcore.runtime import cpu
    from nemo_elastic.nemo.run.ranking import stored_importance
    from nemo_elastic.processes.runlock import locked

    cpu.install()
    parent, layout = configured.config.parent, configured.family().layout
    with locked(out):
        importance, heard = stored_importance(configured, out), partial(on_first(progress), "sort")
        reader = open_parent(parent, layout)
        return write_sorted(out / "sorted", reader, layout, importance, source=parent.path, force=force, heard=heard)


def train(
    config: Given,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Finished:
    """The elastic run, from a parent to `OUT/nested`; ranks and sorts first when that is missing.

    Args:
        resume: go on where an interrupted run stopped.
        force: in place of what an earlier run left in `out`.

    Raises:
        ProblemsError: anything wrong with configuration, layout, parent, or a run folder that is in use.
        Stopped: a signal, or `train.max_time` is over; the state is saved.
    """
    processes, configured = own_processes(), configured_of(config, overrides)
    out = run_folder(out, configured.config.name)
    from nemo_elastic.nemo.run.start_checks import check_train

    check_train(configured, out, processes, resume=resume, force=force)
    from nemo_elastic.mcore.runtime.one_run import one_run

    run = resolved_run(configured, out, (), progress, begins=not resume)
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


def nest(
    config: Given,
    out: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """`OUT/nested`, which is returned, from a training checkpoint of the run (default: the last one).

    Raises:
        ProblemsError: no such checkpoint, another run's configuration, or a folder in the way.
    """
    own_processes()
    configured = configured_of(config, overrides)
    out = run_folder(out, configured.config.name)
    from nemo_elastic.distill.resume import FAMILY, changed_keys
    from nemo_elastic.processes.runlock import locked

    work = resolved_run(configured, out, (), progress)
    raise_if_any(changed_keys(out, configured.config, configured.resolved.values, FAMILY))
    with locked(out):
        return work.nest(Path(checkpoint) if checkpoint else None, force=force)


def quickstart(
    config: Given = TINY,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Quickstart:
    """Rank, sort, train, nest, extract, verify and report; by default the parent and text that ship with the package.

    Args:
        out: run folder; None: `runs/quickstart`.

    Raises:
        ProblemsError: as `train`.
    """
    processes, configured = own_processes(), configured_of(config, overrides)
    out = run_folder(out, "quickstart")
    from nemo_elastic.nemo.run.start_checks import check_train

    check_train(configured, out, processes, force=force)
    from nemo_elastic.mcore.runtime.process_groups import on_first_rank
    from nemo_elastic.nemo import pipeline
    from nemo_elastic.report.write import write_report

    work = resolved_run(configured, out, (), progress, begins=True)
    values = pipeline.quickstart(work, force=force)
    rows = values["budgets"]
    return Quickstart(
        out=out,
        nested=out / "nested",
        verified=values["verified"],
        parameters={row["name"]: row["parameters"] for row in rows},
        heldout_before={row["name"]: row["heldout_before"] for row in rows},
        heldout_losses={row["name"]: row["heldout_nested"] for row in rows},
        report=on_first_rank(lambda: write_report(out)),
        values=values,
    )
