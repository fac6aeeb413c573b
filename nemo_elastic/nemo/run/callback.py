"""`ElasticCallback`: gives every micro-batch its budget and plan, steers the router, evaluates, logs.

Lightning calls the `on_train_*` hooks, NeMo's Megatron step the `on_megatron_*` events. What must survive a restart
(lambdas, pinned subnets) is the callback's state in the checkpoint; everything else is a pure function of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_elastic.config.load import plain
from nemo_elastic.config.sections import RunConfig, StageConfig
from nemo_elastic.distill.curriculum import budget_probabilities, stage_at
from nemo_elastic.distill.training_cost import step_flops
from nemo_elastic.mcore.family.budget_notes import notes_at
from nemo_elastic.mcore.family.expert_load import ExpertLoad
from nemo_elastic.mcore.family.family_model import FamilyModel
from nemo_elastic.mcore.family.planner import Planner, StepState
from nemo_elastic.mcore.models.build import unwrapped
from nemo_elastic.mcore.runtime.parallel import (
    broadcast_from_last_stage,
    data_parallel_rank_and_size,
    from_first_rank,
)
from nemo_elastic.nemo.run.cached_teacher import CachedTeacher
from nemo_elastic.nemo.run.elastic_model import BudgetStats, ElasticMambaModel
from nemo_elastic.nemo.run.guard import FiniteGuard
from nemo_elastic.nemo.run.heldout import Heldout, Measured
from nemo_elastic.nemo.run.metrics import metrics_of
from nemo_elastic.nemo.run.resume import save_checkpoint
from nemo_elastic.nemo.run.session import session
from nemo_elastic.nemo.run.spent import Times, peak_memory
from nemo_elastic.nemo.run.step_record import (
    BUDGET_FIELDS,
    hard_subnets,
    router_probabilities,
    step_record,
    step_subnets,
)
from nemo_elastic.problems import Problem, raise_if_any
from nemo_elastic.processes.runlog import RunLog
from nemo_elastic.space.subnet import Subnet

logger = logging.getLogger(__name__)


class ElasticCallback(pl.Callback):
    """Runs the elastic side of a training.

    Args:
        run: the configuration.
        planner: makes the plans.
        out: records and scalars go to `out/logs`.
        heldout: text for validation per budget.
        choosing: other held-out text, by which a race is decided, or a learned choice against the search's shape.
        guard: measures gradient norms; without one they are not logged.
        progress: called with (step, total, text) after every step on the first rank.
        teacher: its states on disk, instead of the teacher itself.
    """

    def __init__(
        self,
        run: RunConfig,
        planner: Planner,
        out: Path,
        heldout: Heldout,
        choosing: Heldout | None,
        guard: FiniteGuard | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        teacher: CachedTeacher | None = None,
    ) -> None:
        self.run, self.planner, self.heldout, self.progress = run, planner, heldout, progress
        self.records, self.checkpoints = RunLog(out / "logs"), out / "checkpoints"
        self.choosing, self.teacher = choosing, teacher
        self.guard, self.metrics = guard, metrics_of(run, planner, out)
        self.model: FamilyModel | None = None
        self.wrapper: ElasticMambaModel | None = None
        self.state: StepState | None = None
        self.step, self.micro_batch, self.rate = 0, 0, 0.0
        self.tokens = dict.fromkeys(run.elastic.budgets, 0)
        self.last_losses: dict[str, float] = {}
        self.times = Times()
        self.load: ExpertLoad | None = None
        self._load_before: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: ElasticMambaModel) -> None:
        """Connect the loss to the planner."""
        self.wrapper = pl_module
        pl_module.budget_loss = self.planner.loss

    def on_train_start(self, trainer: pl.Trainer, pl_module: ElasticMambaModel) -> None:
        """Zero-shot losses, before the first step of a run."""
        self.model = unwrapped(pl_module.module)
        self.step = trainer.global_step
        self.load = self.model.count_experts(list(self.run.elastic.budgets))
        if self.load is not None and self._load_before is not None:
            self.load.load_state_dict(self._load_before)
        if trainer.is_global_zero:
            self.metrics.start(self.step)
        if self.teacher is not None:
            self.teacher.prepare(self.model)
        if trainer.is_global_zero:
            subnets = self.planner.current_subnets(self.model.policy, max(0, self.step - 1))
            self.records.write("sessions", session(self.step, self.run, self.planner, subnets))
        self.times.lap()
        if self.step == 0:
            if self.planner.race is not None:
                self._begin_race(trainer)
            self._validate(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: ElasticMambaModel, *_: Any) -> None:
        """The step's choices, from the router as it stands."""
        self._end_save(trainer)
        self.step, self.micro_batch, self.rate = trainer.global_step, 0, _rate(trainer)
        first = self.state is None
        self.state = self.planner.begin_step(self.model.policy, self.step, self._draws())
        if rivals := self.planner.rivals(self.state):
            self._choose(trainer, rivals)
        if trainer.is_global_zero:
            for note in notes_at(self.planner, self.state, first):
                logger.warning("step %d: %s", self.step, note)

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        """Put the micro-batch's plan into its batch; the same on all ranks of a replica."""
        if self.state is None:
            return
        rank, size = data_parallel_rank_and_size()
        index = self.micro_batch * size + rank
        count = self.run.distill.budgets_per_batch
        budgets = self.planner.budgets_of(self._stage()[1], self.step, index, count)
        batch["elastic"] = self.planner.micro_batch(self.model.policy, self.state, budgets, index)
        if self.teacher is not None:
            batch["teacher"] = self.teacher.of_micro_batch(self.step, index)
        self.micro_batch += 1

    def _stage(self) -> tuple[StageConfig, dict[str, float]]:
        """The stage of this step, and its probabilities of budgets."""
        stage = stage_at(self.run.train.stages, self.step).stage
        return stage, budget_probabilities(stage, tuple(self.run.elastic.budgets))

    def _draws(self) -> list[dict[str, float]]:
        stage, probabilities = self._stage()
        micro_batches = stage.global_batch_size // (stage.micro_batch_size or self.run.train.micro_batch_size)
        return self.planner.draws_of(probabilities, self.step, micro_batches, self.run.distill.budgets_per_batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ElasticMambaModel, *_: Any) -> None:
        """Steer, log, validate when due."""
        self.planner.end_step(self.state)
        if self.load is not None:
            self.load.end_step(self.run.train.moe_router_bias_update_rate, hard_subnets(self.planner, self.state))
        self._log_step(trainer)
        done = trainer.global_step
        if self.planner.race is not None and self.planner.race.is_due(done):
            self._end_round(trainer, done)
        if done % self.run.train.val_every_steps == 0 or done == self.planner.timeline.total:
            self._validate(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: ElasticMambaModel, checkpoint: dict[str, Any]) -> None:
        """Note which children this checkpoint means: `nest` reads it."""
        self.times.begin_save()
        done = trainer.global_step
        subnets = self.planner.current_subnets(self.model.policy, max(0, done - 1))
        if trainer.is_global_zero:
            described = {name: subnet.to_dict() for name, subnet in subnets.items()}
            self.records.write("checkpoints", {"step": done, "subnets": described, "tokens": dict(self.tokens)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: ElasticMambaModel) -> None:
        """Save the end of the run when `save_every_steps` did not fall on it: the nested checkpoint comes from it."""
        done = trainer.global_step
        # Decided by numbers that all ranks share: what one rank has begun to write, another may already see.
        if done % min(self.run.train.save_every_steps, self.planner.timeline.total):
            save_checkpoint(trainer, self.checkpoints / f"step={done - 1}.ckpt")
        self._end_save(trainer)

    def _end_save(self, trainer: pl.Trainer) -> None:
        seconds = self.times.end_save()
        if seconds is not None and trainer.is_global_zero:
            self.records.write("saves", {"step": trainer.global_step, "seconds": round(seconds, 4)})

    def state_dict(self) -> dict[str, Any]:
        """Lambdas, pinned subnets, tokens seen per budget."""
        metrics = self.metrics.state_dict()
        planner, tokens, elastic = self.planner.state_dict(), dict(self.tokens), plain(self.run.elastic)
        load = None if self.load is None else self.load.state_dict()
        return {"planner": planner, "tokens": tokens, "metrics": metrics, "elastic": elastic, "load": load}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where the checkpoint left off.

        Raises:
            ProblemsError: it is of a run with other dims, choices or budgets: it means other things by them.
        """
        before, now = state_dict["elastic"], plain(self.run.elastic)
        words = "differs from what the run began with; set it back, or start anew in another --out"
        if self.run.router.searches:
            how = f"router.shapes={self.run.router.method}"
            words += f" ({how} finds subnets by OUT/importance, router.tolerance and report.*)"
        raise_if_any(Problem(f"elastic.{key}", words) for key in now if before.get(key) != now[key])
        self.planner.load_state_dict(state_dict["planner"])
        self.tokens.update(state_dict["tokens"])
        self.metrics.load_state_dict(state_dict["metrics"])
        self._load_before = state_dict.get("load")

    def _log_step(self, trainer: pl.Trainer) -> None:
        done, state, due = trainer.global_step, self.state, self.metrics.is_due(trainer.global_step)
        stats = self._stats()
        for name, row in stats.items():
            self.tokens[name] += row["tokens"]
        seconds, cpu_seconds = self.times.lap()
        norms = self.guard.norms if self.guard else (0.0, 0.0)
        subnets = step_subnets(self.planner, state)
        record = step_record(
            done,
            state,
            stats,
            tokens=self.tokens,
            prices={name: self.planner.state.steering.price(name) for name in state.chosen},
            subnets=subnets,
            probabilities=router_probabilities(self.model.policy, state) if due else None,
            experts=self.load.take(
                step_subnets(self.planner, state) if state.phase != "race" else hard_subnets(self.planner, state)
            )
            if due and self.load is not None
            else None,
            lr=self.rate,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            flops=self._flops(stats, subnets),
            grad_norm=norms[0],
            router_grad_norm=norms[1],
        )
        self.metrics.add(record)
        values = self.metrics.row(record) if due else {}
        if not trainer.is_global_zero:
            return
        self.records.write("train", record)
        if due:
            self.metrics.write(done, values, trainer.loggers, state.phase)
        if self.progress:
            losses = "  ".join(f"{n} {b['kd']:.3f}" for n, b in record["budgets"].items())
            text = f"{state.phase}  KD {losses}  {record['tokens_per_second']:,.0f} tokens/s"
            self.progress(done, self.planner.timeline.total, text)

    def _stats(self) -> dict[str, dict[str, Any]]:
        """Per budget of the step, on every rank: the last stage alone computes losses."""
        stats, names = self.wrapper.training_loss_reduction.stats, list(self.run.elastic.budgets)
        keys = (*BUDGET_FIELDS, "micro_batches")
        flat = iter(broadcast_from_last_stage([_field(stats.get(n), key) for n in names for key in keys]))
        rows = {n: {key: next(flat) for key in keys} for n in names}
        counts = ("tokens", "micro_batches")
        return {n: row | {key: int(row[key]) for key in counts} for n, row in rows.items() if row["tokens"]}

    def _flops(self, stats: Mapping[str, Mapping[str, Any]], subnets: Mapping[str, Subnet]) -> float:
        train, stage = self.run.train, stage_at(self.run.train.stages, self.step).stage
        size = (stage.micro_batch_size or train.micro_batch_size) * stage.seq_length / train.context_parallel_size
        tokens = {name: row["micro_batches"] * size for name, row in stats.items()}
        return step_flops(self.run, self.planner.family, stage, self.state.phase, subnets, tokens)

    def catch_up(self, trainer: pl.Trainer, pl_module: ElasticMambaModel) -> None:
        """For a resumed run that had nothing left to do: no training hook was called."""
        if self.model is None:
            self.model = unwrapped(pl_module.module)
            measured = self.measure(self.planner.current_subnets(self.model.policy, trainer.global_step - 1))
            self.last_losses = {name: one.loss for name, one in measured.items()}

    def measure(self, subnets: Mapping[str, Subnet]) -> dict[str, Measured]:
        """Held-out losses of subnets with the weights as they stand. Collective."""
        plans = {name: self.planner.plan_of(subnet) for name, subnet in subnets.items()}
        return {name: self.heldout.measure(self.model, plan) for name, plan in plans.items()}

    def _end_round(self, trainer: pl.Trainer, done: int) -> None:
        """Compare the candidates of a race on text that no loss is reported on; the first rank's losses decide."""
        self._log_race(trainer, self.planner.race.end_round(done, self._contending()))

    def _begin_race(self, trainer: pl.Trainer) -> None:
        """Measure the candidates before the first step; who is far behind does not start."""
        race, losses = self.planner.race, self._contending()
        parent = from_first_rank(self.choosing.measure(self.model, None).loss) if losses else None
        record = race.begin(parent, losses, self.run.router.race_spread)
        self._log_race(trainer, record | {"candidates": race.described()})

    def _choose(self, trainer: pl.Trainer, rivals: Mapping[str, Mapping[str, Subnet]]) -> None:
        """Pin the search's shape where it loses less than what the router chose; the first rank's losses decide."""
        losses = from_first_rank({name: self._on_choosing(row) for name, row in rivals.items()})
        fallen, (seconds, _) = self.planner.fall_back(losses), self.times.lap()
        if trainer.is_global_zero:
            record = {"step": self.step, "losses": losses, "fallen_back": fallen, "seconds": round(seconds, 4)}
            self.records.write("fallback", record)
            for name, row in losses.items():
                words = "the search's shape is pinned instead" if name in fallen else "it stays"
                logger.warning(
                    "step %d: %s: the router's choice loses %.4f, the search's shape %.4f on text to choose by; %s",
                    *(self.step, name, row["learned"], row["search"], words),
                )

    def _on_choosing(self, subnets: Mapping[Any, Subnet]) -> dict[Any, float]:
        plans = {key: self.planner.plan_of(subnet) for key, subnet in subnets.items()}
        return {key: self.choosing.measure(self.model, plan).loss for key, plan in plans.items()}

    def _contending(self) -> dict[str, dict[int, float]]:
        return from_first_rank({n: self._on_choosing(row) for n, row in self.planner.race.contenders().items()})

    def _log_race(self, trainer: pl.Trainer, record: dict[str, Any]) -> None:
        seconds, _ = self.times.lap()
        if trainer.is_global_zero:
            self.records.write("race", record | {"seconds": seconds})
            left = {name: f"{len(row['losses'])} -> {len(row['left'])}" for name, row in record["budgets"].items()}
            logger.info("step %d race, candidates %s", record["step"], left)

    def _validate(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        subnets = self.planner.current_subnets(self.model.policy, max(0, step - 1))
        measured = self.measure(subnets)
        self.last_losses = {name: one.loss for name, one in measured.items()}
        memory, (seconds, _) = peak_memory(next(self.model.parameters()).device), self.times.lap()
        if trainer.is_global_zero:
            record = {
                "step": step,
                "losses": self.last_losses,
                "tokens": dict(self.tokens),
                "subnets": {n: s.to_dict() for n, s in subnets.items()},
                "sources": {n: one.sources for n, one in measured.items() if one.sources},
                "seconds": round(seconds, 4),
                "peak_memory_bytes": memory,
            }
            self.records.write("validation", record)
            losses = {f"budget/{name}/heldout_loss": loss for name, loss in self.last_losses.items()}
            self.metrics.write(step, losses, trainer.loggers, "validation")
            logger.info("step %d held-out %s", step, {n: round(v, 4) for n, v in self.last_losses.items()})
        self.times.lap()


def _field(stats: BudgetStats | None, key: str) -> float:
    return 0.0 if stats is None else float(getattr(stats, key))


def _rate(trainer: pl.Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])
