"""The steps of a run as functions of (configuration, run folder), each done once and skipped when its result is there.

    rank -> sort -> (search shapes) -> train -> nest -> extract -> verify -> results.json -> report

Every process of a distributed run calls every step; what is written, the first rank writes.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.checkpoint.comparison import ChildCheck
from nemo_elastic.config.load import Resolved, leaves, plain
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.family import Configured
from nemo_elastic.files import write_json
from nemo_elastic.importance.store import Importance
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.family.checks import clear_run, is_ranked
from nemo_elastic.mcore.models.build import build_elastic_model, load_weights
from nemo_elastic.mcore.models.evaluate import heldout_loss
from nemo_elastic.mcore.models.parents import is_sorted_by, open_parent, sorted_parent, write_sorted
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.mcore.runtime.automatic import settled_run
from nemo_elastic.mcore.runtime.one_run import one_run
from nemo_elastic.nemo.export.checkpoints import extract, open_nested
from nemo_elastic.nemo.export.from_training import nest_checkpoint
from nemo_elastic.nemo.export.results import RESULTS, results_of
from nemo_elastic.nemo.export.verify import verify
from nemo_elastic.nemo.plain.logs import quiet
from nemo_elastic.nemo.run.ranking import rank_run, stored_importance
from nemo_elastic.nemo.run.start_weights import start_reader
from nemo_elastic.nemo.run.train import (
    Trained,
    choosing_batches,
    data_module,
    heldout_batches,
    latest_checkpoint,
    train,
)
from nemo_elastic.plan.proposals import with_searched_shapes
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.processes.progress import Progress, silent
from nemo_elastic.processes.training_checkpoints import remove_unfinished, whole_checkpoints
from nemo_elastic.space.subnet import Subnet

logger = logging.getLogger(__name__)
PHASES = {"widths": "rank widths", "depth": "rank layers"}  # what a ranking reports, as progress calls it


class Run:
    """A run folder and what is in it: `importance/ sorted/ checkpoints/ logs/ nested/ children/ results.json`."""

    def __init__(
        self, configured: Configured, out: Path, progress: Progress | None = None, *, begins: bool = False
    ) -> None:
        """`begins`: a new run, which decides what `auto` means; else what the run in `out` decided holds."""
        self.configured, self.out = configured.settled(settled_run(configured.resolved, out, begins=begins)), out
        self.progress = progress or silent
        self.seconds: dict[str, float] = {}

    @property
    def config(self) -> RunConfig:
        """The run's sections, without `auto`."""
        return self.configured.config

    def start(self) -> None:
        """Process groups at the run's layout."""
        quiet()
        settings = self.config.train
        process_groups.start(
            settings.tensor_model_parallel_size,
            settings.pipeline_model_parallel_size,
            expert_model_parallel_size=settings.expert_model_parallel_size,
            seed=settings.seed,
            wait_minutes=settings.wait_minutes,
        )

    def clear(self) -> None:
        """Remove what an earlier run left here; to be called with its lock held, when this one can start."""
        process_groups.on_first_rank(lambda: clear_run(self.out))

    def write_config(self) -> None:
        """`OUT/config.json`: every value and its origin."""
        if process_groups.rank() == 0:
            resolved = self.configured.resolved
            write_json(self.out / "config.json", {"values": resolved.values, "origins": resolved.origins})

    def timed(self, name: str, step: Callable[[], Any]) -> Any:
        """Run a step and note its seconds."""
        started = time.monotonic()
        result = step()
        self.seconds[name] = round(time.monotonic() - started, 1)
        return result

    def importance(self, *, resume: bool = False) -> Importance:
        """Measured importance, from disk when it is there."""
        if process_groups.on_first_rank(lambda: is_ranked(self.out)):  # others may still see what was removed
            return stored_importance(self.configured, self.out)
        return rank_run(
            self.configured,
            self.out,
            resume=resume,
            report=lambda phase, done, total: self.progress(PHASES[phase], done, total),
        )

    def search_shapes(self, importance: Importance, sorted_folder: Path) -> None:
        """What `router.shapes` searches for, now that there are scores: subnets, in `OUT/config.json` as well."""
        if not self.config.router.searches:
            return
        given = self.config.elastic.subnets
        config = with_searched_shapes(self.config, str(self.out))
        new = {name: subnet for name, subnet in config.elastic.subnets.items() if name not in given}
        origins = {key: f"router.shapes, by {self.out / 'importance'}" for key, _ in leaves(new, "elastic.subnets")}
        self.configured = Configured(Resolved(config, plain(config), self.configured.resolved.origins | origins))
        self.write_config()

    def sort(self, importance: Importance, *, force: bool = False) -> Path:
        """The sorted parent's folder.

        Raises:
            ProblemsError: of `check_sorted`.
        """
        folder, layout = self.out / "sorted", self.configured.family().layout
        if process_groups.rank() == 0 and (force or not folder.is_dir()):
            reader = open_parent(self.config.parent, layout)
            source, heard = str(self.config.parent.path), partial(self.progress, "sort")
            write_sorted(folder, reader, layout, importance, source=source, force=force, heard=heard)
        process_groups.barrier()
        self.check_sorted(importance)
        return folder

    def check_sorted(self, importance: Importance) -> None:
        """That the sorted parent is sorted by these scores, into this run's groups.

        Raises:
            ProblemsError: by others: these would cut it in the wrong places.
        """
        folder = self.out / "sorted"
        if is_sorted_by(sorted_parent(folder), importance, self.configured.family().layout):
            return
        words = (
            "is sorted by other scores, ffn_groups or expert_groups than this run's; "
            "`nemo-elastic sort --force` sorts it again"
        )
        raise ProblemsError([Problem(str(folder), words)])

    def train(self, sorted_folder: Path, *, resume_from: Path | None = None) -> Trained:
        """The elastic run."""

        def show(step: int, total: int, text: str) -> None:
            self.progress("train", step, total, text)

        trained = train(self.configured, self.out, sorted_folder, resume_from=resume_from, progress=show)
        gc.collect()  # model, optimizer and teacher: what comes next builds its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return trained

    def resume_point(self) -> Path | None:
        """The last whole training checkpoint, None when there is none yet; what a kill left unfinished is removed."""

        def look() -> Path | None:
            remove_unfinished(self.out)
            found = whole_checkpoints(self.out)
            return found[-1] if found else None

        return process_groups.on_first_rank(look)

    def nest(self, checkpoint: Path | None = None, *, force: bool = False) -> Path:
        """The nested checkpoint, from a training checkpoint (default: the last one). Only the first rank works.

        Raises:
            ProblemsError: no such checkpoint, or the run's log does not know its children.
        """
        checkpoint = checkpoint or process_groups.on_first_rank(lambda: latest_checkpoint(self.out))
        if process_groups.rank() == 0:
            nest_checkpoint(self.configured, self.out, checkpoint, force=force, heard=partial(self.progress, "nest"))
        process_groups.barrier()
        return self.out / "nested"

    def extract_all(self, nested: Path, *, force: bool = False) -> dict[str, Path]:
        """One plain NeMo checkpoint per budget, cast as `export.dtype` says."""
        dtype = getattr(torch, self.config.export.dtype) if self.config.export.dtype else None
        names = list(open_nested(nested).manifest.subnets)
        folders = {name: self.out / "children" / name for name in names}
        if process_groups.rank() == 0:
            for done, (name, folder) in enumerate(folders.items()):
                self.progress("extract", done, len(folders), name)
                extract(nested, name, folder, dtype=dtype, force=force)
        self.progress("extract", len(folders), len(folders), "")
        process_groups.barrier()
        return folders

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Held-out text."""
        return heldout_batches(data_module(self.config), self.config)

    def verify(self, nested: Path, children: Mapping[str, Path]) -> list[ChildCheck]:
        """Children against nested subnets."""
        return verify(
            nested,
            children,
            self.config,
            self.batches(),
            report=lambda name, done, total: self.progress(name, done, total, ""),
        )

    def zero_shot(
        self, sorted_folder: Path, subnets: Mapping[str, Subnet], *, chooses: bool = False
    ) -> dict[str, float]:
        """Held-out loss of the same children before any training, cut from what `train` starts with.

        Args:
            chooses: on the windows that shapes are chosen by, not on those that losses are reported on.
        """
        self.start()
        family = self.configured.family(sorted_parent(sorted_folder).depth_ranking)
        groups = family.space.groups
        model = build_elastic_model(
            self.config.model, ffn_groups=groups, sequence_parallel=self.config.train.sequence_parallel
        )
        reader = start_reader(self.config, sorted_parent(sorted_folder))
        load_weights(model, reader, family.architecture, ffn_groups=groups)
        batches = choosing_batches(data_module(self.config), self.config) if chooses else self.batches()
        found = {}
        for done, (name, subnet) in enumerate(subnets.items(), start=1):
            found[name] = heldout_loss(model, batches, hard_plan(model.layout, subnet, self.config.train.mode))
            self.progress("score", done, len(subnets))
        return found

    def results(self, nested: Path, checks: list[ChildCheck], before: Mapping[str, float]) -> dict[str, Any]:
        """The table of a run as plain values; also written to `results.json`."""
        result = results_of(self.config, nested, checks, before=before, seconds=self.seconds)
        if process_groups.rank() == 0:
            write_json(self.out / RESULTS, result)
        process_groups.barrier()
        return result


def quickstart(run: Run, *, force: bool = False) -> dict[str, Any]:
    """All of the above, once; `force`: in place of what an earlier run left there."""
    run.start()
    with one_run(run.out):
        if force:
            run.clear()
        run.write_config()
        importance = run.timed("rank", run.importance)
        sorted_folder = run.timed("sort", lambda: run.sort(importance))
        run.search_shapes(importance, sorted_folder)
        trained = run.timed("train", lambda: run.train(sorted_folder))
        nested = run.timed("nest", run.nest)
        children = run.timed("extract", lambda: run.extract_all(nested))
        checks = run.timed("verify", lambda: run.verify(nested, children))
        return run.results(nested, checks, trained.before)
