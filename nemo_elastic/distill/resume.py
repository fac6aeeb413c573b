"""What a resumed run must keep: everything that the steps behind it were a function of.

    kept = (configuration of the run so far) on these keys == (configuration now) on these keys

Rates, weights of the loss, batch layout and what is logged may change; so may the stages to come, unless the router
would be led past a phase that it has not been through. No torch here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.load import leaves, load_values, plain
from ..config.sections import AUTO, RouterConfig, RunConfig
from ..problems import Problem, ProblemsError
from ..router.schedule import Timeline, resolve_recipe
from .curriculum import history, stage_at, total_steps

FAMILY = ("model", "elastic")  # what weights and subnets of a checkpoint mean
KEPT = (
    *FAMILY, "train.precision", "train.seed", "train.start_from", "data.paths", "data.blend", "data.chat",
    "router.shapes", "router.recipe", "router.hidden_size",
    "router.warmup_fraction", "router.soft_fraction", "router.freeze_fraction",
    "router.race_fraction", "router.race_rounds", "router.candidates", "router.candidate_spread", "router.race_spread",
    "router.shortfall",
)  # fmt: skip
FREE = ("model.seq_length",)  # the stages say it
PARTLY = ("elastic", "router")  # sections whose new keys are not compared with a version that did not know them
NOTHING = object()


def changed_keys(out: Path, config: RunConfig, values: Mapping[str, Any], keys: Sequence[str] = KEPT) -> list[Problem]:
    """Every key among `keys` that the run in `out` was started with and that now says something else.

    Args:
        values: `Resolved.values` of `config`.
    """
    before = _values(out)
    found = []
    for key in keys if before is not None else ():
        was, now = (dict(leaves(_at(v, key), key)) for v in (_as_now(before), _known(_as_now(values), before)))
        if was == {key: {}} and key.partition(".")[0] not in PARTLY:  # a version that did not know it: as by default
            was = dict(leaves(_at(plain(RunConfig()), key), key))
        if config.router.searches:  # what the search has found is written beside what was given
            was = {k: v for k, v in was.items() if not k.startswith("elastic.subnets") or k in now}
            now = {k: v for k, v in now.items() if k != "elastic.subnets" or v}
        for name in sorted(was.keys() | now.keys()):
            old, new = was.get(name, NOTHING), now.get(name, NOTHING)
            if old != new and new != AUTO and name not in FREE:  # auto: what the run has begun with
                words = f"{_said(new)}, but the run in {out} has {_said(old)}; keep that to resume, or start anew"
                found.append(Problem(name, words))
    return found


def stage_problems(out: Path, config: RunConfig, done: int) -> Iterator[Problem]:
    """Stages that would lead the router past a phase, after `done` steps of the run in `out`."""
    values = _values(out)
    if values is None or not done or not config.train.stages:
        return
    try:
        before = load_values(values)
    except ProblemsError:  # of another version, whose keys are not these
        return
    if history(before.train.stages, done) != history(config.train.stages, done):
        words = f"say other lengths or batches of the {done} steps that the run in {out} has read"
        yield Problem("train.stages", f"{words}; keep those, and change later stages")
        return
    if not (config.router.learns or config.router.races):
        return
    old, new = _timeline(before), _timeline(config)
    phase = old.phase(done)
    if phase == "frozen":  # every choice is made
        return
    order = config.router.phases
    if order.index(new.phase(done)) > order.index(phase):
        words = f"would lead into the router's phase {new.phase(done)!r} at step {done + 1}, which is to be {phase!r}"
        yield Problem("train.stages", f"{words}: keep at least as many steps as the run has, or start anew")
        return
    point = stage_at(before.train.stages, done)
    now = config.train.stages[point.index].steps if point.index < len(config.train.stages) else 0
    if point.step_in_stage and now < point.stage.steps:
        words = f"{now} shortens a stage that is being read (step {point.step_in_stage} of {point.stage.steps})"
        yield Problem(f"train.stages.{point.index}.steps", f"{words}; keep {point.stage.steps}, or change later stages")


def _as_now(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `router.shapes` as the method that they mean; of a version without races, too."""
    router = dict(values.get("router", {}))
    frozen, shapes = bool(router.get("frozen")), router.get("shapes", AUTO)
    if "race_fraction" in router:
        router["shapes"] = RouterConfig(frozen=frozen, shapes=shapes, recipe=router.get("recipe", "default")).method
    else:
        router["shapes"] = shapes if frozen else "learned"
    return {**values, "router": router}


def _known(values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the keys of a section that the version before did not have."""
    return {
        name: {k: v for k, v in section.items() if k in before.get(name, {})} if name in PARTLY else section
        for name, section in values.items()
    }


def _timeline(config: RunConfig) -> Timeline:
    return Timeline.of(resolve_recipe(config.router), total_steps(config.train.stages), config.train.stages)


def _values(out: Path) -> Mapping[str, Any] | None:
    """The configuration that the run was started with last; None where nobody wrote one."""
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, {}) if isinstance(values, Mapping) else {}
    return values


def _said(value: Any) -> str:
    return "null" if value is None else "nothing" if value is NOTHING or value == {} else repr(value)
