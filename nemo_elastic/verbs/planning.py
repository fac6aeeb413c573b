"""`plan`: what is asked, whether that makes sense, and the answer as plain values, as `plan --json` prints them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..family import Configured, Family
from ..files import output_problems
from ..plan.of_nested import plan_nested, write_subnets
from ..plan.of_parent import is_parent, plan_parent
from ..plan.of_run import plan
from ..plan.proposals import best_of_each, measured_order, parse_method, racing, search, with_searched_shapes
from ..problems import Problem, ProblemsError, raise_if_any
from ..shapes.candidates import Candidate
from ..space.subnet import Subnet
from .given import Given, resolved_of

MOST_GPUS = 1 << 20  # more is a slip of the pen, and takes long to lay out
Score = Callable[[Configured, Path, Mapping[str, Subnet], bool], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked of: a configuration, or the `folder` of a parent or a nested checkpoint. The rest is named
    like the flags of `plan`, `hint` is what to add where no configuration is named.
    """

    config: Given | None = None
    folder: str | None = None
    overrides: tuple[str, ...] = ()
    train: bool = False
    gpus: int | None = None
    gpu_memory: float | None = None
    search: str | None = None
    ranking: str | None = None
    score: bool = False
    budget: str | None = None
    output: str | None = None
    force: bool = False
    hint: str = ""

    @property
    def of_parent(self) -> bool:
        """Whether the folder is a parent's."""
        return self.folder is not None and is_parent(self.folder)

    def configured(self) -> Configured:
        """The configuration.

        Raises:
            ProblemsError: none, or anything wrong in it.
        """
        return Configured(resolved_of(self.config, self.overrides, self.hint))


def answer(asked: Asked, score: Score) -> dict[str, Any]:
    """The plan. Its `problems` are not raised.

    Args:
        score: held-out losses of subnets of a ranked run's sorted parent, which takes torch.

    Raises:
        ProblemsError: questions that do not go together, and what makes no plan at all.
    """
    raise_if_any(misplaced(asked))
    if asked.of_parent:
        return plan_parent(str(asked.folder))
    if asked.folder is not None:
        return _of_nested(asked, asked.folder)
    return _proposals(asked, score) if asked.search else _of_configuration(asked)


def misplaced(asked: Asked) -> list[Problem]:
    """What does not go together."""
    nested = asked.folder is not None
    if asked.of_parent:
        flags = ("search", "ranking", "score", "train", "budget", "output", "force")
        given = [f"--{name}" for name in flags if getattr(asked, name)] + list(asked.overrides)
        given += ["--gpus"] if asked.gpus is not None else []
        words = "does not go with a parent's folder; change what `nemo-elastic config --from PARENT > mine.yaml` writes"
        return [Problem(word, words) for word in given]
    found = []
    if asked.budget and not nested:
        found.append(Problem("--budget", "is for `plan NESTED`; budgets of a configuration are in elastic.budgets"))
    if asked.output and not (nested or asked.search):
        found.append(Problem("--output", "is for `plan NESTED` and --search, whose subnets it writes"))
    if asked.force and not asked.output:
        found.append(Problem("--force", "replaces what --output names; give that, or leave it out"))
    found += [Problem(f"--{name}", "is for `plan --config`, not for a nested checkpoint")
              for name in ("search", "ranking", "score", "train") if getattr(asked, name) and nested]  # fmt: skip
    if asked.gpus is None and asked.gpu_memory is not None:
        found.append(Problem("--gpu-memory", "belongs to --gpus N; give that, or leave it out"))
    if asked.gpus is not None and (nested or asked.search):
        found.append(Problem("--gpus", f"lays out a configured run; leave out {'NESTED' if nested else '--search'}"))
    if asked.gpus is not None and asked.gpus < 1:
        found.append(Problem("--gpus", f"{asked.gpus} must be above 0"))
    if asked.gpus is not None and asked.gpus > MOST_GPUS:
        found.append(Problem("--gpus", f"{asked.gpus} must be at most {MOST_GPUS:,}"))
    if asked.gpu_memory is not None and not 0 < asked.gpu_memory < float("inf"):
        found.append(Problem("--gpu-memory", f"{asked.gpu_memory:g} must be a number of GB above 0"))
    if asked.train and asked.search:
        found.append(Problem("--train", "shows a configured run; leave out --search"))
    if asked.score and not (asked.search and asked.ranking):
        found.append(Problem("--score", "needs --search and --ranking RUN, with RUN/sorted in it"))
    return found


def _of_configuration(asked: Asked) -> dict[str, Any]:
    """The plan, what training it will cost, and with `train` the resolved run."""
    resolved = asked.configured().resolved
    config, ranking = resolved.config, _depth_ranking(asked, resolved.config.model)
    if asked.ranking and config.router.searches:
        with suppress(ProblemsError):  # the plan says it, too
            config = with_searched_shapes(config, asked.ranking)
    family: Family | None = None
    candidates: dict[str, list[Candidate]] = {}
    with suppress(ProblemsError):  # the plan says it
        family = Configured(replace(resolved, config=config)).family(ranking)
        candidates = racing(config, family, asked.ranking) if asked.ranking else {}
    result = plan(config, ranking, family=family, racing=candidates)
    if family is None:
        return result | {"training": None} | ({"run": None} if asked.train else {})
    from ..distill.training_cost import training_cost
    from ..distill.training_plan import training_plan

    subnets = {b["name"]: family.space.subnet_from_dict(b["subnet"]) for b in result["budgets"]}
    result["training"] = training_cost(config, family, subnets)
    if asked.gpus is not None:
        _lay_out(asked.gpus, asked.gpu_memory, result, config, family, subnets)
    return result | {"run": training_plan(config, family)} if asked.train else result


def _depth_ranking(asked: Asked, model: Mapping[str, Any]) -> tuple[int, ...] | None:
    if not asked.ranking:
        return None
    from ..config.model_fields import architecture_of
    from ..shapes.damage import read_scores

    return read_scores(asked.ranking, architecture_of(model)).depth_ranking


def _lay_out(
    gpus: int, gpu_memory: float | None, result: dict[str, Any], config: Any, family: Family, subnets: Any
) -> None:
    """What fits, into the plan; where nothing does, the plan's problem."""
    from ..distill.gpu_work import Work
    from ..distill.layouts import filled, layouts

    if result["training"] is None:
        words = "needs train.stages, and a subnet for every budget: without them nothing is known of a step"
        result["problems"].append({"key": "--gpus", "message": words})
        return
    work = Work(config, family, subnets)
    found = layouts(work, gpus, gpu_memory or config.report.gpu.memory_gb)
    result["layouts"] = found.pop("layouts")
    result["gpus"] = found
    if not result["layouts"]:
        result["problems"].append({"key": "--gpus", "message": _nothing_fits(found, filled(work, gpus))})


def _nothing_fits(found: Mapping[str, Any], others: Iterable[int]) -> str:
    least, count = found["leanest"], found["count"]
    if least is None:
        words = "TP x PP x CP x DP, with batches dealt in whole micro-batches"
        near = f"; nearest: {', '.join(map(str, others))}" if others else ""
        return f"{count} is filled by no layout: {words}{near}"
    sizes = ", ".join(f"{name} {least[name]}" for name in least if name.endswith("size") and least[name] != 1)
    words = f"{count} GPUs of {found['memory_gb']:g} GB hold no layout; the leanest needs {least['memory_gb']:.1f} GB"
    return f"{words} ({sizes or 'one GPU'}); take more GPUs, shorter sequences, or fewer budgets_per_batch"


def _proposals(asked: Asked, score: Score) -> dict[str, Any]:
    configured, method = asked.configured(), parse_method(str(asked.search))
    if asked.output and method.count > 1:
        words = f"takes one subnet per budget, --search {asked.search} proposes {method.count}; use random:1"
        raise ProblemsError([Problem("--output", words)])
    result = search(configured.config, method, asked.ranking)
    if asked.output and not result["budgets"]:
        raise ProblemsError([Problem("--output", "every budget is the parent or has its subnet; nothing to write")])
    measured = method.name == "measured"
    if measured:
        _score(configured, Path(str(asked.ranking)), result, score, chooses=True)
        measured_order(result)
    _write(asked, best_of_each(result))
    if asked.score and not measured:
        _score(configured, Path(str(asked.ranking)), result, score)
    return result


def _score(configured: Configured, run: Path, result: dict[str, Any], score: Score, *, chooses: bool = False) -> None:
    """Held-out loss of every proposal, cut from the sorted parent without any training.

    Args:
        chooses: on other windows than those that losses are reported on.
    """
    run = run.parent if run.name == "importance" else run
    if not (run / "sorted").is_dir():
        words = f"needs a sorted parent at {str(run / 'sorted')!r}; run `nemo-elastic sort --out {run}`"
        raise ProblemsError([Problem("--search" if chooses else "--score", words)])
    space = configured.family().space
    keyed = {str(i): space.subnet_from_dict(b["subnet"]) for i, b in enumerate(result["budgets"])}
    losses = score(configured, run, keyed, chooses)
    for i, row in enumerate(result["budgets"]):
        row["heldout_loss"] = losses[str(i)]


def _of_nested(asked: Asked, folder: str) -> dict[str, Any]:
    from ..checkpoint.manifest import load_manifest

    if not (Path(folder).expanduser() / "elastic").is_dir():
        words = (
            "is no nested checkpoint and no parent: give the folder of a Hugging Face download, of a NeMo checkpoint, "
        )
        words += "or of a nested one" + ("" if Path(folder).exists() else "; nothing is there (nothing is downloaded)")
        raise ProblemsError([Problem(folder, words)])
    result = plan_nested(load_manifest(folder), asked.budget, asked.overrides)
    _write(asked, result)
    return result


def _write(asked: Asked, result: dict[str, Any]) -> None:
    """`output`, where it was asked for."""
    if asked.output:
        raise_if_any(output_problems("--output", Path(asked.output), force=asked.force))
        write_subnets(Path(asked.output), result)
