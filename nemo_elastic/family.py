"""A configured family: the parent's architecture, the space of its children, and the budgets they have to meet.

A verb makes a `Configured` of the configuration it was given and hands that on: the family, and once there are scores
the ranked one, are made in one place and once.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .config.load import Resolved
from .config.model_fields import architecture_of
from .config.recipe import recipe_notes
from .config.sections import RunConfig, TrainConfig
from .cost.budget import BudgetCost
from .cost.conditions import serving_of
from .kinds.axis import Groups
from .problems import Problem, ProblemsError, raise_if_any
from .shapes.search import propose_uniform
from .space.alignment import rounding_step
from .space.architecture import Architecture
from .space.blocks import DEPTH_UNITS, block_problems
from .space.budget import Budget
from .space.dims import DEALT_DIMS, DIMS, KIND_OF_DIM, ElasticDim, dim_groups, least_size, parent_size, resolve_choices
from .space.elastic_space import ElasticSpace
from .space.layout import ParamLayout
from .space.subnet import Subnet


@dataclass(frozen=True, kw_only=True)
class Family:
    """Parent, space and budgets. `forced` holds the subnets of budgets that are given instead of learned (all of them
    when nothing is left to a router or a race). `races`: candidates race for the others. `unread`: notes on
    settings that nothing reads. `model`: the parent's model
    section.
    """

    architecture: Architecture
    space: ElasticSpace
    budgets: tuple[Budget, ...]
    forced: Mapping[str, Subnet]
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] | None = None
    races: bool = False
    unread: tuple[str, ...] = ()

    @cached_property
    def layout(self) -> ParamLayout:
        return ParamLayout(self.architecture, ffn_groups=self.space.groups)

    @property
    def learned(self) -> tuple[str, ...]:
        """Budgets that a router decides: neither the full network nor forced."""
        return () if self.races else self.open

    @property
    def raced(self) -> tuple[str, ...]:
        """Budgets that a race decides."""
        return self.open if self.races else ()

    @property
    def open(self) -> tuple[str, ...]:
        """Budgets whose shape training decides: neither the full network nor forced."""
        return tuple(b.name for b in self.budgets if not b.is_full and b.name not in self.forced)

    def budget(self, name: str) -> Budget:
        """The budget of that name.

        Raises:
            ProblemsError: naming the known ones.
        """
        for budget in self.budgets:
            if budget.name == name:
                return budget
        known = ", ".join(b.name for b in self.budgets)
        raise ProblemsError([Problem("--budget", f"{name!r} is no budget of this family; known: {known}")])


class Configured:
    """A checked configuration, and the families it means: before ranking, and by a measured one."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self._families: dict[tuple[int, ...] | None, Family] = {}

    @property
    def config(self) -> RunConfig:
        """Its sections."""
        return self.resolved.config

    def family(self, depth_ranking: Sequence[int] | None = None) -> Family:
        """The family; the same object for the same ranking.

        Raises:
            ProblemsError: as `family_of`.
        """
        key = None if depth_ranking is None else tuple(depth_ranking)
        if key not in self._families:
            self._families[key] = family_of(self.config, key)
        return self._families[key]

    def settled(self, resolved: Resolved) -> "Configured":
        """The same with other values of keys that no family depends on (`mcore.runtime.automatic`)."""
        other = Configured(resolved)
        other._families = self._families
        return other


def family_of(config: RunConfig, depth_ranking: tuple[int, ...] | None = None) -> Family:
    """The family a configuration describes; ratios are rounded to legal sizes here, once.

    Raises:
        ProblemsError: with every illegal choice, budget and forced subnet.
    """
    architecture = architecture_of(config.model)
    unit = DEPTH_UNITS[config.elastic.depth_unit or "layer"]
    raise_if_any(block_problems(architecture.hybrid_override_pattern) if unit > 1 else [])
    if config.elastic.expert_groups is not None and not architecture.layers_of(KIND_OF_DIM["num_moe_experts"]):
        words = f"{config.elastic.expert_groups} groups of experts, of which the model has none; leave it out"
        raise ProblemsError([Problem("elastic.expert_groups", words)])
    groups = dim_groups(architecture, config.elastic.groups, unit)
    found: list[Problem] = []
    dims: dict[str, ElasticDim] = {}
    notes: list[str] = []
    for name, dim in config.elastic.dims.items():
        full = parent_size(architecture, name)
        if name in KIND_OF_DIM and not architecture.layers_of(KIND_OF_DIM[name]):
            continue  # a shared file of choices may know kinds that this parent has no layer of
        if not full:
            continue  # nor a shared expert that this parent has not
        try:
            step = rounding_step(name, dim.choices, full, groups[name], architecture, config.elastic.multiple_of)
            if step > full:
                given = config.elastic.multiple_of.get(name)
                words = f"{given} (with {groups[name]} groups: {step}) must be at most the parent's {full}"
                key = f"elastic.multiple_of.{name}" if given else f"elastic.dims.{name}"
                none = f"its {groups[name]} groups need a multiple of {step}, more than the parent's {full}; lower "
                found.append(Problem(key, words if given else f"{none}elastic.{DEALT_DIMS.get(name, 'ffn_groups')}"))
                continue
            choices, rounded = resolve_choices(name, dim.choices, full, step)
            dims[name] = ElasticDim(
                name=name,
                full=full,
                groups=groups[name],
                choices=choices,
                per_layer=dim.per_layer,
                least=least_size(architecture, name),
            )
            notes += rounded
        except ProblemsError as error:
            found += error.problems
    budgets = []
    for name, target in config.elastic.budgets.items():
        try:
            budgets.append(parse_budget(name, target))
        except ProblemsError as error:
            found += error.problems
    found += _no_teacher(config, budgets)
    try:
        space = ElasticSpace(
            architecture=architecture,
            dims=dims,
            ffn_groups=config.elastic.ffn_groups,
            expert_groups=config.elastic.expert_groups,
            depth_ranking=depth_ranking,
            depth_unit=unit,
        )
    except ProblemsError as error:
        raise ProblemsError((*found, *error.problems)) from error
    forced = {}
    for name, sizes in config.elastic.subnets.items():
        try:
            forced[name] = space.subnet_from_dict(sizes)
        except ProblemsError as error:
            found += [Problem(f"elastic.subnets.{name}.{p.key}", p.message) for p in error.problems]
        except (TypeError, ValueError, AttributeError) as error:
            found.append(
                Problem(f"elastic.subnets.{name}", f"{sizes!r} must map dims ({', '.join(DIMS)}) to sizes: {error}")
            )
    raise_if_any(found)
    for name in (b.name for b in budgets if b.is_full and b.name in forced):
        if forced.pop(name) != space.full_subnet():
            words = "is another network, but this budget is the parent itself; remove it or lower the budget"
            raise ProblemsError([Problem(f"elastic.subnets.{name}", words)])
    free = [b for b in budgets if b.name not in forced and not b.is_full]
    if free and not (config.router.learns or config.router.races):
        forced |= _uniform(config, space, free)
        if config.router.searches:
            found_by = f"router.shapes={config.router.method}"
            notes.append(f"{found_by} finds shapes once there is a ranking; even shrinking stands in for them")
    return Family(
        architecture=architecture,
        space=space,
        budgets=tuple(budgets),
        forced=forced,
        notes=(*notes, *config.router.unread, *recipe_notes(config)),
        unread=tuple(config.router.unread),
        model=config.model,
        races=config.router.races,
    )


def _no_teacher(config: RunConfig, budgets: Sequence[Budget]) -> list[Problem]:
    """Why the full member cannot teach: what no step trains is nobody's teacher for long."""
    full = [budget.name for budget in budgets if budget.is_full]
    if not config.distill.self_taught or not budgets or len(budgets) < len(config.elastic.budgets):
        return []
    if not full:
        words = "self needs a budget of 1.0, the full member that teaches; add one to elastic.budgets, or take parent"
        return [Problem("distill.teacher", words)]
    words = f"never draws {full[0]}, which distill.teacher=self lets teach the others; give it a share, or take parent"
    given = ((i, stage.budget_probabilities) for i, stage in enumerate(config.train.stages))
    return [
        Problem(f"train.stages.{i}.budget_probabilities", words)
        for i, shares in given
        if shares is not None and not any(shares.get(name, 0) > 0 for name in full)
    ]


def _uniform(config: RunConfig, space: ElasticSpace, budgets: Iterable[Budget]) -> dict[str, Subnet]:
    """What stands for budgets without a subnet of their own before anything is searched: the even shrink."""
    layout = ParamLayout(space.architecture, ffn_groups=space.groups)
    conditions = serving_of(config.report, space.architecture).conditions
    found: list[Problem] = []
    subnets = {}
    for budget in budgets:
        try:
            cost = BudgetCost(space, layout, budget, **conditions)
            subnets[budget.name] = propose_uniform(cost, tolerance=config.router.tolerance)
        except ProblemsError as error:
            found += error.problems
    raise_if_any(found)
    return subnets


SHORT_KINDS = {"latency": "latency_ms", "memory": "memory_gb"}
FEWEST_PARAMETERS = 1000  # of any model; what lies between a fraction and that is a mistake


def parse_budget(name: str, target: Any) -> Budget:
    """`0.75` is a fraction of the parent's parameters, `9000000000` parameters, `{kind:, value:}` says it in full."""
    key = f"elastic.budgets.{name}"
    if isinstance(target, Mapping):
        unknown = set(target) - {"kind", "value"}
        kind, value = target.get("kind"), target.get("value")
        kind = SHORT_KINDS.get(kind, kind) if isinstance(kind, str) else kind
        if unknown or not isinstance(kind, str) or not _is_number(value):
            words = f"{dict(target)!r} must be {{kind: {'|'.join(Budget.KINDS)}, value: number}}"
            raise ProblemsError([Problem(key, words)])
        return Budget(name=name, kind=kind, value=value)
    if isinstance(target, str):
        with suppress(ValueError):
            target = float(target)
    if not _is_number(target):
        raise ProblemsError(
            [Problem(key, f"{target!r} must be a fraction, a number of parameters or {{kind:, value:}}")]
        )
    if target <= 1:
        return Budget(name=name, kind="fraction", value=float(target))
    if target < FEWEST_PARAMETERS:
        words = f"{target:g} is neither a fraction of the parent (up to 1.0) nor a number of parameters; 60% is 0.6"
        raise ProblemsError([Problem(key, words)])
    return Budget(name=name, kind="parameters", value=float(target))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def parallel_problems(architecture: Architecture, train: TrainConfig, groups: Groups) -> list[Problem]:
    """What the parallel layout breaks for the PARENT in training (children keep the parent's stages)."""
    found = []
    tp, pp = train.tensor_model_parallel_size, train.pipeline_model_parallel_size
    for sizes in ({"tp_size": tp}, {"ep_size": train.expert_model_parallel_size}):
        try:
            ParamLayout(architecture, ffn_groups=groups, **sizes)
        except ProblemsError as error:
            found += error.problems
    n = architecture.num_layers
    if n % pp:
        near = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0 and d <= 16)
        words = f"{pp} must divide the parent's {n} layers (Megatron would build only {n // pp * pp}); possible: {near}"
        found.append(Problem("train.pipeline_model_parallel_size", words))
    if train.sequence_parallel and tp == 1:
        found.append(
            Problem("train.sequence_parallel", "true needs train.tensor_model_parallel_size above 1; set false")
        )
    for name in ("virtual_pipeline_model_parallel_size",):
        size = getattr(train, name)
        if size is not None and size > 1:
            found.append(Problem(f"train.{name}", f"{size} is not supported yet; leave it at 1"))
    if train.sequence_parallel and train.context_parallel_size == 1:  # else `plan.context` asks for more
        for i, stage in enumerate(train.stages):
            if stage.seq_length % tp:
                words = f"{stage.seq_length} must be a multiple of the tensor parallel size {tp} (sequence_parallel)"
                found.append(Problem(f"train.stages.{i}.seq_length", words))
    return found
