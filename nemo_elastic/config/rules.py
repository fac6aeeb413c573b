"""Rules that hold inside a configuration whatever the machine: allowed words, ranges, names that must agree."""

from collections.abc import Iterable
from datetime import date

from ..cost.conditions import byte_profile
from ..kinds import kinds_by_dim
from ..problems import Problem, ProblemsError, did_you_mean
from ..space.blocks import DEPTH_UNITS
from ..space.budget import name_problems
from ..space.dims import DIMS, WIDTH_DIMS
from .durations import seconds_of
from .recipe import RECIPES
from .sections import AUTO, PHASES, RACE_PHASES, SHAPES, RouterConfig, RunConfig, StageConfig

ALLOWED = {
    "parent.output_weights": (None, "embedding", "lm_head"),
    "data.chat.layout": ("padded", "packed"),
    **{f"rank.{name}": tuple(sites) for kind in kinds_by_dim() for name, sites in kind.ranking.items()},
    "rank.aggregation": ("mean_l2", "l2_l2", "mean_mean"),
    "rank.depth": ("greedy", "one_shot", "cosine", "random"),
    "rank.depth_metric": ("centred_mse", "mse"),
    "elastic.depth_unit": (None, *DEPTH_UNITS),
    "router.recipe": ("default", "paper"),
    "router.shapes": (AUTO, *SHAPES),
    "distill.loss": ("forward_kl", "reverse_kl", "topk_kl"),
    "distill.teacher": ("parent", "self"),
    "train.recipe": RECIPES,
    "train.mode": ("sliced", "masked"),
    "train.precision": ("auto", "32", "bf16-mixed"),
    "train.recompute_granularity": (None, "full", "selective"),
    "export.dtype": (None, "bfloat16", "float32"),
    "export.hf_schema": ("uniform", "list", "per_layer_config"),
}
POSITIVE = (
    "elastic.ffn_groups", "rank.samples", "rank.seq_length", "rank.micro_batch_size", "rank.depth_samples",
    "router.candidates", "router.race_rounds", "router.hidden_size",
    "router.tau_start", "router.tau_end", "router.lr", "distill.temperature",
    "distill.top_k", "distill.budgets_per_batch", "train.micro_batch_size",
    "train.optimizer.lr", "train.log_every_steps",
    "train.wait_minutes", "train.val_every_steps", "train.val_samples", "train.save_every_steps", "report.batch_size",
    "report.sequence_length", "report.mfu", "report.peak_tflops",
    "report.gpu.memory_gb", "report.gpu.matmul_tflops", "report.gpu.memory_tbs", "report.gpu.memory_passes",
    "report.gpu.node_gpus", "report.gpu.node_gbs", "report.gpu.network_gbs",
    "train.tensor_model_parallel_size", "train.pipeline_model_parallel_size",
    "train.context_parallel_size", "train.expert_model_parallel_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "router.budget_lambda", "router.dual_ascent_rate", "router.dead_zone", "router.tolerance", "router.settle_weight",
    "distill.kd_weight",
    "distill.ce_weight", "distill.hidden_weight", "train.optimizer.min_lr",
    "train.optimizer.warmup_steps", "train.optimizer.weight_decay",
    "train.optimizer.clip_grad", "data.num_workers", "rank.min_attention_layers",
    "report.gpu.reserve_gb",
)  # fmt: skip
LOGGERS = ("tensorboard", "wandb")
SEEDS = ("train.seed", "rank.seed")  # 32 bits: what Lightning and numpy take
FRACTIONS = (
    "router.warmup_fraction",
    "router.soft_fraction",
    "router.freeze_fraction",
    "router.settle_fraction",
    "router.race_fraction",
    "report.mfu",
    "train.moe_router_bias_update_rate",  # a score is from 0 to 1
)


def rule_problems(config: RunConfig) -> list[Problem]:
    """Every rule that `config` breaks."""
    found = []
    for key, words in ALLOWED.items():
        value = _get(config, key)
        if value not in words:
            listed = ", ".join("null" if w is None else w for w in words)
            found.append(Problem(key, f"{value!r} must be one of {listed}"))
    found += [Problem(k, f"{_get(config, k)} must be above 0") for k in POSITIVE if not _get(config, k) > 0]
    found += [Problem(k, f"{_get(config, k)} must not be negative") for k in NOT_NEGATIVE if not _get(config, k) >= 0]
    found += [Problem(k, f"{_get(config, k)} must be from 0 to 1") for k in FRACTIONS if not 0 <= _get(config, k) <= 1]
    for key in SEEDS:
        if not 0 <= _get(config, key) < 2**32:
            found.append(Problem(key, f"{_get(config, key)} must be from 0 to {2**32 - 1}"))
    for i, name in enumerate(config.train.loggers):
        if name not in LOGGERS:
            found.append(Problem(f"train.loggers.{i}", f"{name!r} is no logger{did_you_mean(name, LOGGERS)}"))
    if config.train.wandb_project and "wandb" not in config.train.loggers:
        words = "names a project of W&B, which nothing is logged to; add wandb to train.loggers, or leave it out"
        found.append(Problem("train.wandb_project", words))
    if len(config.train.optimizer.betas) != 2:
        found.append(Problem("train.optimizer.betas", f"{list(config.train.optimizer.betas)} must be two numbers"))
    chunk = config.distill.chunk_tokens
    if chunk != AUTO and (isinstance(chunk, str) or chunk < 1):
        found.append(Problem("distill.chunk_tokens", f"{chunk!r} must be auto or a number above 0"))
    weights = (config.distill.kd_weight, config.distill.ce_weight, config.distill.hidden_weight)
    if not any(weights):
        words = "0 with distill.ce_weight=0 and distill.hidden_weight=0 leaves nothing to learn; set one above 0"
        found.append(Problem("distill.kd_weight", words))
    elif config.distill.teacher_cache and not config.distill.needs_teacher:
        words = "has no use with distill.kd_weight=0 and distill.hidden_weight=0; leave it out"
        found.append(Problem("distill.teacher_cache", words))
    elif config.distill.teacher == "self" and not config.distill.needs_teacher:
        words = "self has no use with distill.kd_weight=0 and distill.hidden_weight=0; leave it out"
        found.append(Problem("distill.teacher", words))
    elif config.distill.self_taught and not config.distill.teacher_cache and not config.distill.of_full.ce_weight:
        words = "0 with distill.kd_weight=0 and distill.teacher=self leaves the full member nothing to learn; "
        found.append(Problem("distill.ce_weight", words + "set it above 0, or name a distill.teacher_cache"))
    if config.train.precision != "32" and config.train.use_distributed_optimizer is False:
        words = "false needs train.precision=32: Megatron's plain optimizer cannot save bf16; leave it empty or true"
        found.append(Problem("train.use_distributed_optimizer", words))
    found += _rate_problems(config)
    found += _saving_problems(config)
    return [
        *found,
        *_profile_problems(config),
        *_data_problems(config),
        *_elastic_problems(config),
        *_stage_problems(config),
    ]


def _get(config: RunConfig, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _saving_problems(config: RunConfig) -> Iterable[Problem]:
    train = config.train
    for name in ("keep_checkpoints", "keep_every_steps"):
        if getattr(train, name) is not None and getattr(train, name) < 1:
            yield Problem(f"train.{name}", f"{getattr(train, name)} must be at least 1; empty: no limit")
    every = train.keep_every_steps
    if every is not None and train.keep_checkpoints is None:
        yield Problem("train.keep_every_steps", f"{every} has no use while all are kept; set train.keep_checkpoints")
    elif every is not None and train.save_every_steps > 0 and every % train.save_every_steps:
        words = (
            f"{every} must be a multiple of train.save_every_steps={train.save_every_steps}, when there are checkpoints"
        )
        yield Problem("train.keep_every_steps", words)
    try:
        seconds_of(train.max_time)
    except ValueError as error:
        yield Problem("train.max_time", str(error))


def _rate_problems(config: RunConfig) -> Iterable[Problem]:
    settings = config.train.optimizer
    rates = {"train.optimizer.lr": settings.lr, "router.lr": config.router.lr}
    rates |= {f"train.stages.{i}.lr": s.lr for i, s in enumerate(config.train.stages) if s.lr is not None}
    moves = "train.moe_router_bias_update_rate"
    rates[moves] = moved = config.train.moe_router_bias_update_rate
    if moved and not config.model.get("moe_router_enable_expert_bias"):
        words = f"{moved} moves a bias that this parent has not (model.moe_router_enable_expert_bias); leave it out"
        yield Problem(moves, words)
    for key, rate in rates.items():
        if rate == float("inf"):
            yield Problem(key, "inf must be finite")
        elif key not in ("router.lr", moves) and rate < settings.min_lr:
            yield Problem(key, f"{rate} must not be below train.optimizer.min_lr={settings.min_lr}")
    if any(not 0 <= beta < 1 for beta in settings.betas):
        yield Problem("train.optimizer.betas", f"{list(settings.betas)} must be from 0 to below 1")


def _profile_problems(config: RunConfig) -> Iterable[Problem]:
    try:
        byte_profile(config.report.profile)
    except ProblemsError as error:
        yield from error.problems


def _data_problems(config: RunConfig) -> Iterable[Problem]:
    if config.data.paths and config.data.blend:
        yield Problem("data.blend", "cannot stand beside data.paths; name every source in data.blend")
    for i, source in enumerate(config.data.blend):
        if not 0 < source.weight < float("inf"):
            yield Problem(f"data.blend.{i}.weight", f"{source.weight} must be above 0; leave the source out instead")
    if config.data.chat.end == "":
        yield Problem("data.chat.end", "'' must end a turn; give a marker, or null for the end-of-text token")
    for name in ("start", "end"):
        if config.data.chat.template and getattr(config.data.chat, name) is not None:
            yield Problem(f"data.chat.{name}", "means nothing beside data.chat.template; leave one of them out")
    try:
        date.fromisoformat(config.data.chat.date)
    except ValueError:
        yield Problem("data.chat.date", f"{config.data.chat.date!r} must be a day; e.g. '2025-01-31'")


def _elastic_problems(config: RunConfig) -> Iterable[Problem]:
    experts = config.elastic.expert_groups
    if experts is not None and experts < 1:
        yield Problem("elastic.expert_groups", f"{experts} must be above 0; empty: elastic.ffn_groups")
    if config.rank.ffn_site == "linear_fc1_output" and config.model.get("gated_linear_unit"):
        words = "linear_fc1_output has a gate and a neuron for each unit of a gated MLP; rank by linear_fc2_input"
        yield Problem("rank.ffn_site", words)
    yield from _shape_problems(config.router)
    for name in config.elastic.dims:
        if name not in DIMS:
            yield Problem(f"elastic.dims.{name}", f"is no elastic dim{did_you_mean(name, DIMS)}")
    for name in config.elastic.budgets:
        yield from name_problems(name)
    for name, multiple in config.elastic.multiple_of.items():
        if name not in WIDTH_DIMS:
            yield Problem(f"elastic.multiple_of.{name}", f"is no width{did_you_mean(name, WIDTH_DIMS)}")
        elif multiple < 1:
            yield Problem(f"elastic.multiple_of.{name}", f"{multiple} must be above 0; 1 rounds to the groups alone")
    for name in config.elastic.subnets:
        if name not in config.elastic.budgets:
            yield Problem(f"elastic.subnets.{name}", f"is no budget{did_you_mean(name, config.elastic.budgets)}")


def _shape_problems(router: RouterConfig) -> Iterable[Problem]:
    if router.frozen and router.method in ("race", "learned"):
        words = f"{router.method} is nothing frozen; leave router.frozen out, or say search, greedy or even"
        yield Problem("router.shapes", words)
    if router.recipe == "paper" and not (router.learns or router.frozen):
        words = f"{router.shapes} leaves nothing to learn by router.recipe=paper; say learned, or leave that out"
        yield Problem("router.shapes", words)
    for name in ("candidate_spread", "race_spread"):
        if not getattr(router, name) >= 1:
            yield Problem(f"router.{name}", f"{getattr(router, name)} must be at least 1, which is the least itself")
    if router.shortfall is not None and not 0 <= router.shortfall < 1:
        yield Problem("router.shortfall", f"{router.shortfall} must be a part of the budget, from 0 to less than 1")


def _stage_problems(config: RunConfig) -> Iterable[Problem]:
    phases = config.router.phases
    previous, named = -1, [stage.router is not None for stage in config.train.stages]
    if any(named) and not all(named):
        yield Problem("train.stages", "give `router` for every stage or for none")
    for i, stage in enumerate(config.train.stages):
        key = f"train.stages.{i}"
        yield from _stage_sizes(config, stage, key)
        if stage.router is not None and stage.router not in phases:
            words = f"{stage.router!r} must be one of null, {', '.join(phases)}"
            other = PHASES if config.router.races else RACE_PHASES
            hint = f" (router.shapes={'learned' if config.router.races else 'race'} has {', '.join(other)})"
            yield Problem(f"{key}.router", words + (hint if stage.router in other else ""))
        elif stage.router is not None:
            if phases.index(stage.router) < previous:
                words = f"{stage.router!r} cannot follow {phases[previous]!r}: the order is {', '.join(phases)}"
                yield Problem(f"{key}.router", words)
            previous = phases.index(stage.router)
        if stage.budget_probabilities is None:
            continue
        for name, p in stage.budget_probabilities.items():
            if name not in config.elastic.budgets:
                yield Problem(
                    f"{key}.budget_probabilities.{name}", f"is no budget{did_you_mean(name, config.elastic.budgets)}"
                )
            elif p < 0:
                yield Problem(f"{key}.budget_probabilities.{name}", f"{p} must not be negative")
        if not sum(stage.budget_probabilities.values()) > 0:
            yield Problem(f"{key}.budget_probabilities", "must sum to more than 0")


def _stage_sizes(config: RunConfig, stage: StageConfig, key: str) -> Iterable[Problem]:
    for name in ("steps", "seq_length", "global_batch_size", "micro_batch_size", "lr"):
        value = getattr(stage, name)
        if value is not None and not value > 0:
            remedy = "; give steps or tokens" if name == "steps" else ""
            yield Problem(f"{key}.{name}", f"{value} must be above 0{remedy}")
    if stage.tokens is not None and stage.steps != stage.steps_of_tokens():
        words = f"{stage.tokens} are {stage.steps_of_tokens()} steps, but steps is {stage.steps}; give one of the two"
        yield Problem(f"{key}.tokens", words)
    micro = stage.micro_batch_size or config.train.micro_batch_size
    if micro > 0 and stage.global_batch_size % micro:
        name = f"{key}.micro_batch_size" if stage.micro_batch_size else "train.micro_batch_size"
        words = f"{stage.global_batch_size} must be a multiple of {name}={micro}: samples are dealt in micro-batches"
        yield Problem(f"{key}.global_batch_size", words)
