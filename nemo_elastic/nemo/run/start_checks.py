"""Everything that can be known to fail before a long verb starts, in seconds and in one message.

    rank      launcher's variables, layout, parent, text, cache, temporary folder, OUT
    train     the same, curriculum and budgets, stored scores, what a resume must keep

The checks themselves lie beside what they look at; here they are called in order, and their problems joined. No model,
no Megatron and no NeMo is loaded. Under torchrun the first process looks at what all of them share (parent, text, OUT),
each at its own machine's folders, and all come to the same answer (`mcore.runtime.meeting`).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from nemo_elastic.config.parent_files import parent_files
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.data.entries import entry_problems
from nemo_elastic.data.of_run import check_text, text_tokenizer
from nemo_elastic.data.tokens import default_cache_dir
from nemo_elastic.distill.resume import changed_keys, stage_problems
from nemo_elastic.distill.training_cost import checkpoint_bytes, checkpoints_kept, disk_bytes
from nemo_elastic.family import Configured, parallel_problems
from nemo_elastic.files import folder_problems
from nemo_elastic.importance.belongs import foreign_scores
from nemo_elastic.importance.store import Importance
from nemo_elastic.mcore.family.checks import HOW_TO_GO_ON, check_inputs, check_processes, is_ranked, run_problems
from nemo_elastic.mcore.models.parents import open_parent, weights_digest
from nemo_elastic.mcore.runtime.meeting import raise_together
from nemo_elastic.nemo.run.start_weights import start_problems
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any
from nemo_elastic.processes.runlock import lock_problems
from nemo_elastic.processes.training_checkpoints import steps_done, whole_checkpoints

logger = logging.getLogger(__name__)
LONGEST_TMPDIR = 75  # a socket's path has 107 bytes; multiprocessing adds `/pymp-xxxxxxxx/listener-xxxxxxxx`
BOTH = "goes on with the run that --force would remove; leave one of the two out"
Check = Callable[[], Iterable[Problem] | None]


def check_rank(run: Configured, out: Path, processes: int, *, once: bool = False) -> None:
    """Whether `rank` can run; with `once`, nothing is looked at where it has run.

    Raises:
        ProblemsError: all that is wrong, at once.
    """
    config = run.config

    def parent() -> None:
        family = run.family()
        raise_if_any(parallel_problems(family.architecture, config.train, family.space.groups))
        open_parent(config.parent, family.layout)
        say_left_out(config.parent.path)

    checks = (
        parent,
        lambda: check_processes(config, processes, ranks=True, trains=False),
        *_surroundings(config, out, trains=False),
        lambda: _not_trained(out),
    )
    raise_together(
        lambda: [] if once and is_ranked(out) else collected(*checks),
        lambda: collected(*_of_this_machine(config, out)),
        wait_minutes=config.train.wait_minutes,
    )


@cache
def say_left_out(parent: str | None) -> None:
    """Once: what of a parent its children are made without."""
    said = parent_files(parent) if parent else None
    if said and said.left_out:
        logger.warning("%s", said.left_out)


def check_train(
    run: Configured,
    out: Path,
    processes: int,
    *,
    resume: bool = False,
    force: bool = False,
    remedy: str = HOW_TO_GO_ON,
) -> None:
    """Whether `train` (or `quickstart`) can run; with `force`, whatever an earlier run left in `out`.

    Args:
        remedy: what can be done about an `out` in use, in the words of the command the user gave.

    Raises:
        ProblemsError: all that is wrong, at once.
    """
    config = run.config

    def shared() -> list[Problem]:
        again = is_ranked(out) and not force
        return collected(
            lambda: check_inputs(run),
            lambda: start_problems(config, run.family(), out),
            lambda: say_left_out(config.parent.path),
            lambda: check_processes(config, processes, ranks=not again),
            *_surroundings(config, out),
            lambda: run_problems(out, force=force, resume=resume, remedy=remedy),
            lambda: [Problem("--resume", BOTH)] if force and resume else None,
            lambda: _disk(run, out),
            lambda: _stored(run, out) if again else None,
            lambda: _kept(run, out) if resume else None,
        )

    own = _of_this_machine(config, out)
    raise_together(shared, lambda: collected(*own), wait_minutes=config.train.wait_minutes)


def collected(*checks: Check) -> list[Problem]:
    """The problems of all checks, each said once. One that finds nothing to look at because of another is silent.

    Raises:
        ValueError: from a check that names no key, when nothing else is wrong.
    """
    found: list[Problem] = []
    plain: list[ValueError] = []
    for check in checks:
        try:
            found += check() or ()
        except ProblemsError as error:
            found += error.problems
        except ValueError as error:
            plain.append(error)
    if plain and not found:
        raise plain[0]
    return list(dict.fromkeys(found))


def _of_this_machine(config: RunConfig, out: Path) -> tuple[Check, ...]:
    """Folders that are written in, as this process finds them."""
    return (
        lambda: folder_problems("--out", out),
        lambda: folder_problems("data.cache_dir", config.data.cache_dir or default_cache_dir()),
        lambda: _temporary(config),
    )


def _surroundings(config: RunConfig, out: Path, *, trains: bool = True) -> tuple[Check, ...]:
    """Text, and whether somebody else is at work."""
    return (lambda: _text(config, trains=trains), lambda: lock_problems(out))


def _text(config: RunConfig, *, trains: bool) -> list[Problem] | None:
    """Text is tokenized into the cache when it is looked at, so that folder comes first."""
    found = folder_problems("data.cache_dir", config.data.cache_dir or default_cache_dir())
    return [*found, *entry_problems(config.data)] if found else check_text(config, trains=trains)


def _temporary(config: RunConfig) -> list[Problem]:
    """What reads ahead hands tensors over by a socket below TMPDIR; with too long a path they wait for ever."""
    folder = tempfile.gettempdir()
    if not config.data.num_workers or len(folder.encode()) <= LONGEST_TMPDIR:
        return []
    words = f"{config.data.num_workers} needs a TMPDIR of at most {LONGEST_TMPDIR} bytes, {folder!r} has "
    return [Problem("data.num_workers", f"{words}{len(folder.encode())}; export TMPDIR=/tmp, or set it to 0")]


def _disk(run: Configured, out: Path) -> list[Problem]:
    """Room for the run: two training checkpoints at least, as one goes when the next is whole; a warning below all."""
    config, family = run.config, run.family()
    each = checkpoint_bytes(config, family, {})
    needed = disk_bytes(config, family, each)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    had = sum(
        f.stat().st_size for part in ("checkpoints", "sorted", "nested") for f in (out / part).rglob("*") if f.is_file()
    )
    least = needed["sorted"] + needed["nested"] + min(2, checkpoints_kept(config)["count"]) * each["training"]
    words = f"{there} has {free / 1e9:.3g} GB free"
    if free + had < least:
        return [Problem("--out", f"{words}, and this run needs {least / 1e9:.3g} GB at the least; name another disk")]
    if free + had < needed["total"] - needed["teacher_cache"]:
        more = f"the whole run would take {needed['total'] / 1e9:,.3g} GB"
        more += f"; train.keep_checkpoints=1 takes {least / 1e9:,.3g}"
        logger.warning("%s, %s", words, more)
    return []


def _not_trained(out: Path) -> list[Problem]:
    if any((out / "checkpoints").glob("step=*")):
        return [Problem("--out", f"{out} has checkpoints that were trained by its scores; choose another one")]
    return []


def _stored(run: Configured, out: Path) -> list[Problem]:
    """Scores that `train` would go on from. Weights at another path than theirs are compared here, else when read."""
    config, family = run.config, run.family()
    provenance = Importance.load(out / "importance", family.architecture).provenance
    moved = provenance.get("source", {}).get("parent") != config.parent.path
    digest = weights_digest(open_parent(config.parent, family.layout), family.layout) if moved else None
    tokenizer = text_tokenizer(config).sha256
    return foreign_scores(provenance, config, family, given=run.resolved.origins, digest=digest, tokenizer=tokenizer)


def _kept(run: Configured, out: Path) -> list[Problem]:
    found = whole_checkpoints(out)
    if not found:
        return []
    config, done = run.config, steps_done(found[-1])
    return [*changed_keys(out, config, run.resolved.values), *stage_problems(out, config, done)]
