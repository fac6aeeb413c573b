"""What can be known to fail before anything is started or written. Quick: no model, no Megatron, no NeMo."""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from ...config.sections import RunConfig
from ...family import Configured, Family
from ...files import folder_problems
from ...plan.of_run import plan
from ...problems import Problem, ProblemsError, raise_if_any
from ...processes.launchers import data_parallel_size
from ...processes.run_parts import PARTS
from ...space.alignment import convolution_notes
from ..models.parents import open_parent
from ..runtime.cpu import has_mamba_kernels

HOW_TO_GO_ON = "go on with --resume, start over with --force, or choose another --out"

NO_STAGES = Problem("train.stages", "is empty; give at least one stage, e.g. [{steps: 100}]")


def check_inputs(run: Configured) -> None:
    """Layout, curriculum, budgets and the parent of a training run.

    Raises:
        ProblemsError: all that is wrong, at once.
    """
    config, family = run.config, None
    with suppress(ProblemsError):  # the plan says it
        family = run.family()
    found = [Problem(p["key"], p["message"]) for p in plan(config, family=family)["problems"]]
    for name in config.train.loggers:
        if importlib.util.find_spec(name) is None:
            words = f"{name} is not installed here; `pip install {name}`, or leave it out"
            found.append(Problem("train.loggers", words))
        elif name == "wandb" and not _wandb_can_log():
            words = "wandb has no API key here; `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
            found.append(Problem("train.loggers", words))
    if config.distill.teacher_cache:
        found += folder_problems("distill.teacher_cache", config.distill.teacher_cache)
    if not config.train.stages:
        found.append(NO_STAGES)
    if not config.elastic.budgets:
        found.append(Problem("elastic.budgets", "is empty; name at least one, e.g. {full: 1.0, half: 0.5}"))
    if family is not None:
        found += kernel_problems(config, family)
    if not found:
        try:
            open_parent(config.parent, run.family().layout)
        except ProblemsError as error:
            found += error.problems
    raise_if_any(found)


def kernel_problems(config: RunConfig, family: Family) -> list[Problem]:
    """What the GPU kernels of THIS machine refuse; nothing where our own run in their place."""
    if not torch.cuda.is_available():
        return []
    train, found = config.train, []
    if has_mamba_kernels():
        notes = convolution_notes(family.space, train.tensor_model_parallel_size, train.context_parallel_size)
        found += [Problem("elastic.dims", note) for note in notes]
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    if train.context_parallel_size > 1 and train.precision == "32" and has_engine:
        words = "32 has no attention kernel of Transformer Engine under context parallelism; take bf16-mixed"
        found.append(Problem("train.precision", words))
    return found


def check_processes(config: RunConfig, processes: int, *, ranks: bool = False, trains: bool = True) -> None:
    """Whether so many processes can be dealt to the layout, and the samples to its replicas.

    Args:
        ranks: the parent is not ranked yet, the run begins with it.
        trains: stages are read.

    Raises:
        ProblemsError: they do not divide.
    """
    settings = config.train
    tp, pp = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    context, experts = settings.context_parallel_size, settings.expert_model_parallel_size
    replicas, found = data_parallel_size(processes, tp, pp, context, experts), []
    if trains and not settings.stages:
        raise ProblemsError([NO_STAGES])
    for i, stage in enumerate(settings.stages if trains else ()):
        micro = stage.micro_batch_size or settings.micro_batch_size
        if stage.global_batch_size % (micro * replicas):
            words = f"{stage.global_batch_size} must be a multiple of micro batch {micro} x {replicas} replicas"
            found.append(Problem(f"train.stages.{i}.global_batch_size", words))
    replicas = data_parallel_size(processes, tp, pp, 1, experts)  # a ranking has no context parallelism
    for field in ("samples", "depth_samples") if ranks else ():
        if (count := getattr(config.rank, field)) % (shares := replicas // experts):
            words = f"{count} must be a multiple of the {shares} data-parallel ranks" + of_experts(experts)
            found.append(Problem(f"rank.{field}", words))
    raise_if_any(found)


def of_experts(size: int) -> str:
    """That expert-parallel ranks see the same samples."""
    return f" that do not share experts ({size} do)" if size > 1 else ""


def is_ranked(out: Path) -> bool:
    """Whether a run folder has the importance of its parent."""
    return (out / "importance" / "importance.json").is_file()


def _wandb_can_log() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")


def run_problems(out: Path, *, force: bool, resume: bool = False, remedy: str = HOW_TO_GO_ON) -> list[Problem]:
    """Why a run may not begin in `out`: never train over another one without being told to.

    `remedy` is what the problem says can be done, in the words of the command the user gave.
    """
    used = [name for name in ("checkpoints", "nested") if (out / name).exists()]
    if not used or resume:
        return []
    found = " and ".join(used)
    if not force:
        return [Problem(str(out), f"already has {found}; {remedy}")]
    if not (out / "config.json").is_file():
        words = f"has {found} but no config.json: no run of this program, and --force leaves it alone; choose another"
        return [Problem("--out", f"{out} {words}")]
    return []


def clear_run(out: Path) -> None:
    """Remove what a run wrote in `out`, and nothing else."""
    for part in (out / name for name in PARTS):
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
