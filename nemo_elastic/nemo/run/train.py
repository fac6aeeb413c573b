"""The elastic run, top to bottom: family, data, model, optimizer, trainer, fit, nested checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.config.durations import seconds_of
from nemo_elastic.config.load import plain
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.data.of_run import tokenizer_of
from nemo_elastic.distill.curriculum import total_steps
from nemo_elastic.family import Configured, Family, parallel_problems
from nemo_elastic.mcore.checkpoint.held_checkpoint import HeldCheckpoint
from nemo_elastic.mcore.elastic.model import refuse_overlap
from nemo_elastic.mcore.family.checks import check_processes
from nemo_elastic.mcore.family.gradients import of_router
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.mcore.models.parents import sorted_parent
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.mcore.runtime.automatic import settled
from nemo_elastic.nemo.plain.data import TextDataModule
from nemo_elastic.nemo.plain.logs import quiet
from nemo_elastic.nemo.plain.open_saves import given_up_on_error
from nemo_elastic.nemo.plain.plain_config import plain_model_config
from nemo_elastic.nemo.plain.tokenizer import load_tokenizer
from nemo_elastic.nemo.plain.trainer import build_optimizer, build_trainer
from nemo_elastic.nemo.run.cached_teacher import CachedTeacher
from nemo_elastic.nemo.run.callback import ElasticCallback
from nemo_elastic.nemo.run.elastic_model import ElasticMambaModel, ElasticSSMConfig
from nemo_elastic.nemo.run.guard import FiniteGuard
from nemo_elastic.nemo.run.heldout import heldout_of
from nemo_elastic.nemo.run.kept_checkpoints import KeptCheckpoints
from nemo_elastic.nemo.run.learning_rate import ROUTER_MARK, CurriculumRate
from nemo_elastic.nemo.run.loggers import finish, loggers_of
from nemo_elastic.nemo.run.resume import StopOnSignal, interrupts_as_they_are
from nemo_elastic.nemo.run.start_weights import start_reader
from nemo_elastic.nemo.run.zero_shot import measure_zero_shot
from nemo_elastic.plan.context import context_problems
from nemo_elastic.plan.proposals import racing, starts
from nemo_elastic.problems import Problem, Stopped, raise_if_any
from nemo_elastic.processes.launchers import started_processes
from nemo_elastic.processes.training_checkpoints import steps_done, whole_checkpoints
from nemo_elastic.router.race import Race
from nemo_elastic.router.schedule import Timeline, resolve_recipe
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the family with its measured ranking, a subnet per budget, and the last checkpoint.

    `before`: held-out loss of the same subnets, cut from the sorted parent without training.
    """

    family: Family
    subnets: dict[str, Subnet]
    checkpoint: Path
    heldout_losses: dict[str, float]
    tokens: dict[str, int]
    before: dict[str, float]


def train(
    configured: Configured,
    out: Path,
    sorted_folder: Path,
    *,
    resume_from: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Trained:
    """Train a family from a sorted parent.

    Args:
        out: checkpoints go to `out/checkpoints`, logs to `out/logs`.
        resume_from: a training checkpoint of the same run.
        progress: called with (step, total, text) after every step on the first rank.

    Raises:
        ProblemsError: a layout or curriculum that cannot run; a NaN or Inf on the way.
        Stopped: a signal, or `train.max_time` is over; the state is saved.
    """
    run, parent = settled(configured.config), sorted_parent(sorted_folder)
    family = configured.family(parent.depth_ranking)
    raise_if_any(shapes_not_searched(run, family))
    start_reader(run, parent)  # refuses what does not belong to this parent
    raise_if_any(parallel_problems(family.architecture, run.train, family.space.groups))
    raise_if_any(context_problems(family, run.train))
    check_processes(run, started_processes())
    process_groups.start(  # NeMo keeps the groups of a ranking in this process, which had no context parallelism
        run.train.tensor_model_parallel_size,
        run.train.pipeline_model_parallel_size,
        run.train.context_parallel_size,
        expert_model_parallel_size=run.train.expert_model_parallel_size,
        seed=run.train.seed,
        wait_minutes=run.train.wait_minutes,
    )
    stages, settings = run.train.stages, run.train.optimizer
    steps, data = total_steps(stages), data_module(run)
    layout = {
        "tensor_model_parallel_size": run.train.tensor_model_parallel_size,
        "pipeline_model_parallel_size": run.train.pipeline_model_parallel_size,
        "context_parallel_size": run.train.context_parallel_size,
        "expert_model_parallel_size": run.train.expert_model_parallel_size,
        "sequence_parallel": run.train.sequence_parallel,
        "precision": run.train.precision,
    }
    config = plain_model_config(
        {**run.model, "seq_length": max(stage.seq_length for stage in stages)},
        **layout,
        config_class=ElasticSSMConfig,
        run=plain(run),
        sorted_parent=str(sorted_folder),
        variable_seq_lengths=True,  # stages exchange [s, b, k] of any k ...
        moe_token_dispatcher_type="alltoall",  # ... which Megatron refuses beside its default, MoE or not
        **_recompute(run),
    )
    optimizer = build_optimizer(
        settings.lr,
        precision=run.train.precision,
        min_lr=settings.min_lr,
        schedule=CurriculumRate(plain(stages), plain(settings), resolve_recipe(run.router).lr),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        clip_grad=settings.clip_grad,
        use_distributed_optimizer=run.train.distributed_optimizer,
        scale_lr_cond=is_router,
        lr_mult=ROUTER_MARK,
        no_weight_decay_cond=decays_not,
    )
    model = ElasticMambaModel(config, optim=optimizer, tokenizer=data.tokenizer)
    timeline = Timeline.of(resolve_recipe(run.router), steps, stages)
    if timeline.races and not family.raced:  # every budget has its subnet
        timeline = replace(timeline, frozen=0)
    race = Race(racing(run, family, str(out)), timeline.rounds(run.router.race_rounds)) if family.raced else None
    planner = Planner(
        family,
        run.router,
        ParamLayout(
            family.architecture,
            ffn_groups=family.space.groups,
            tp_size=run.train.tensor_model_parallel_size,
            ep_size=run.train.expert_model_parallel_size,
        ),
        timeline=timeline,
        seed=run.train.seed,
        race=race,
        starts=starts(run, family, str(out)),
        mode=run.train.mode,
        sharing=run.train.sharing,
        **serving_of(run.report, family.architecture).conditions,
    )
    teacher = CachedTeacher(run, data, sorted_folder, config.params_dtype) if run.distill.teacher_cache else None
    guard = FiniteGuard()
    chooses = race is not None or bool(planner.starts)
    heldout, choosing = heldout_of(data, run), heldout_of(data, run, between=True) if chooses else None
    callback = ElasticCallback(run, planner, out, heldout, choosing, guard, progress, teacher)
    stop = StopOnSignal(run.train.preemption, seconds_of(run.train.max_time))
    kept = run.train.keep_checkpoints
    keep = None if kept is None else KeptCheckpoints(out, kept, run.train.keep_every_steps)
    trainer = build_trainer(
        out,
        max_steps=steps,
        global_batch_size=stages[0].global_batch_size,
        micro_batch_size=stages[0].micro_batch_size or run.train.micro_batch_size,
        use_distributed_optimizer=run.train.distributed_optimizer,
        checkpoint_every=min(run.train.save_every_steps, steps),
        async_save=run.train.async_save,
        callbacks=[callback, guard, stop, *filter(None, [keep])],
        loggers=loggers_of(run, out, steps_done(resume_from)),
        log_every_n_steps=run.train.log_every_steps,
        seed=run.train.seed,
        **layout,
    )
    refuse_overlap(trainer.strategy.ddp_config)
    # One rank alone would raise in Megatron's own check; the guard stops all, and says where.
    trainer.strategy.ddp_config.check_for_nan_in_grad = False
    quiet()
    # Megatron's loader unpickles: it is given what was checked.
    held = HeldCheckpoint(resume_from) if resume_from else nullcontext()
    with keep or nullcontext(), stop, held as checked:
        with interrupts_as_they_are(), given_up_on_error(trainer):
            trainer.fit(model, data, ckpt_path=None if checked is None else str(checked))
        finish(trainer.loggers)
        process_groups.barrier()  # the first rank takes the mark of an unfinished checkpoint away last
        if keep is not None:
            keep.clear()
    on_its_device(model)
    callback.catch_up(trainer, model)
    last = process_groups.on_first_rank(lambda: latest_checkpoint(out))
    if trainer.global_step < steps:
        saved = f"after step {trainer.global_step} of {steps} and saved {last}"
        raise Stopped(f"stopped {saved}; go on with --resume")
    subnets = planner.current_subnets(callback.model.policy, steps - 1)
    before = measure_zero_shot(
        out, run, family, callback.model, sorted_folder, subnets, callback.heldout, callback.measure
    )
    return Trained(
        family=family,
        subnets=subnets,
        checkpoint=last,
        heldout_losses=callback.last_losses,
        tokens=callback.tokens,
        before=before,
    )


def on_its_device(model: torch.nn.Module) -> None:
    """Back from the CPU, where Lightning leaves a model after a fit: what is measured behind it runs on the GPU."""
    if torch.cuda.is_available():
        model.to(torch.device("cuda", torch.cuda.current_device()))


def shapes_not_searched(run: RunConfig, family: Family) -> list[Problem]:
    """Budgets that even shrinking stands in for, because nobody has searched yet."""
    if not run.router.searches:
        return []
    missing = [b.name for b in family.budgets if not b.is_full and b.name not in run.elastic.subnets]
    words = (
        f"has no subnet yet, which router.shapes={run.router.method} searches for: train by `api.train`, or give one"
    )
    return [Problem(f"elastic.subnets.{name}", words) for name in missing]


def is_router(name: str, parameter: Any) -> bool:
    """The router's parameters: own learning rate, no weight decay."""
    return of_router(name)


def decays_not(name: str, parameter: Any) -> bool:
    """Vectors (norms, biases, A, D) and the router. At module level, so that NeMo can write it into a context."""
    return is_router(name, parameter) or parameter.dim() == 1


def data_module(run: RunConfig) -> TextDataModule:
    """The run's text by its curriculum; held-out text has the last stage's length."""
    stages = run.train.stages
    return TextDataModule(
        load_tokenizer(tokenizer_of(run), run.data.end_of_text),
        seq_length=stages[-1].seq_length,
        micro_batch_size=run.train.micro_batch_size,
        global_batch_size=stages[-1].global_batch_size,
        stages=plain(stages),
        seed=run.train.seed,
        paths=run.data.paths,
        cache_dir=run.data.cache_dir,
        num_workers=run.data.num_workers,
        blend=plain(run.data.blend),
        chat=plain(run.data.chat),
        vocab_size=run.model["vocab_size"],
    )


def heldout_batches(data: TextDataModule, run: RunConfig) -> list[tuple[torch.Tensor, ...]]:
    """(tokens, labels[, mask]) `[micro_batch, s]` of `train.val_samples` windows, spread evenly over held-out text."""
    return heldout_of(data, run).batches


def choosing_batches(data: TextDataModule, run: RunConfig) -> list[tuple[torch.Tensor, ...]]:
    """As `heldout_batches`, of windows between those that losses are reported on."""
    return heldout_of(data, run, between=True).batches


def latest_checkpoint(out: Path) -> Path:
    """The last complete training checkpoint under `out`.

    Raises:
        ProblemsError: there is none.
    """
    found = whole_checkpoints(out)
    if not found:
        raise_if_any([Problem(str(out / "checkpoints"), "has no training checkpoint; run `nemo-elastic train` first")])
    return found[-1]


def _recompute(run: RunConfig) -> dict[str, Any]:
    kind = run.train.recompute_granularity
    if kind is None:
        return {}
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
