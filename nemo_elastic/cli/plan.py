"""`plan`: what every budget will be, on a laptop, in a second; and what a trained family has between its budgets."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import folder_problems
from ..problems import Problem, ProblemsError, raise_if_any
from .arguments import configuration, folders, is_override, overrides, verb_parser

MOST_GPUS = 1 << 20  # more is a slip of the pen, and takes long to lay out
EXAMPLES = """examples:
  nemo-elastic plan /models/my_parent                    # is it supported, and what a family of it could be
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --json report.sequence_length=32768 report.profile=fp8
  nemo-elastic plan --config conf/my_parent.yaml train.tensor_model_parallel_size=4
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --train report.mfu=0.4 report.peak_tflops=989
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --gpus 64 --gpu-memory 80
  nemo-elastic plan --config conf/tiny_parent.yaml --search beam --ranking runs/tiny
  nemo-elastic plan --config conf/tiny_parent.yaml --search measured --ranking runs/tiny --json
  nemo-elastic plan runs/tiny/nested --budget 0.6 --output subnet.yaml
  nemo-elastic extract runs/tiny/nested --subnet subnet.yaml
  nemo-elastic plan --config conf/tiny_parent.yaml --search greedy --ranking runs/tiny --output shapes.yaml
  nemo-elastic plan runs/tiny/nested --budget memory_gb:12 report.sequence_length=131072

exit code 2 when the plan has problems; it is printed all the same"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "sizes, parameters, memory, FLOPs and legality of every budget, and what training will cost"
    parser = verb_parser(subparsers, "plan", run, help, ("--config", "--json", "--force", "--verbose"), epilog=EXAMPLES)
    parser.add_argument(
        "--train", action="store_true", help="show the resolved run: what is trained and frozen, steps, schedules"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="layouts over N GPUs that fit, the fastest first (estimated)"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: report.gpu.memory_gb)")
    parser.add_argument(
        "--search", metavar="HOW", help="propose subnets by uniform, random:N, greedy, beam or measured"
    )
    parser.add_argument(
        "--ranking", metavar="RUN", help="the folder that `rank` wrote: scores and measured depth ranking"
    )
    parser.add_argument(
        "--score", action="store_true", help="held-out loss of every proposal (RUN/sorted, loads torch)"
    )
    parser.add_argument(
        "--budget",
        metavar="VALUE",
        help="of NESTED: 0.6, a number of parameters, KIND:VALUE, or a trained budget's name",
    )
    words = "of NESTED or --search: write the subnets, to force (base:) or to extract"
    parser.add_argument("--output", metavar="YAML", help=words)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 2 when it has problems."""
    raise_if_any(_misplaced(arguments))
    found = folders(arguments, "NESTED or PARENT", optional=1) if not arguments.config else folders(arguments)
    if found and _names_parent(arguments):
        result = _of_parent(found[0])
    elif found:
        result = _of_nested(arguments, found[0])
    elif arguments.search:
        result = _proposals(arguments)
    else:
        result = _of_configuration(arguments)
    if arguments.json:
        arguments.answer.json(result)
    else:
        from .plan_table import plan_tables

        arguments.answer.render(*plan_tables(result))
        if result.get("training"):
            from .plan_training import training_tables

            arguments.answer.render(*training_tables(result))
        if "layouts" in result:
            from .plan_layouts import layout_tables

            arguments.answer.render(*layout_tables(result))
    return 2 if result["problems"] else 0


def _names_parent(arguments: argparse.Namespace) -> bool:
    from ..plan.of_parent import is_parent

    return any(is_parent(word) for word in arguments.words if not is_override(word))


def _of_parent(folder: str) -> dict[str, Any]:
    """The plan of the configuration that `config --from` would write; a parent that is not supported is refused."""
    from ..plan.of_parent import plan_parent

    return plan_parent(folder)


def _misplaced(arguments: argparse.Namespace) -> list[Problem]:
    nested = not arguments.config and any(not is_override(word) for word in arguments.words)
    if nested and _names_parent(arguments):
        flags = ("search", "ranking", "score", "train", "budget", "output", "force")
        given = [f"--{name}" for name in flags if getattr(arguments, name)] + overrides(arguments)
        given += ["--gpus"] if arguments.gpus is not None else []
        words = "does not go with a parent's folder; change what `nemo-elastic config --from PARENT > mine.yaml` writes"
        return [Problem(word, words) for word in given]
    found = []
    if arguments.budget and not nested:
        found.append(Problem("--budget", "is for `plan NESTED`; budgets of a configuration are in elastic.budgets"))
    if arguments.output and not (nested or arguments.search):
        found.append(Problem("--output", "is for `plan NESTED` and --search, whose subnets it writes"))
    if arguments.force and not arguments.output:
        found.append(Problem("--force", "replaces what --output names; give that, or leave it out"))
    found += [Problem(f"--{name}", "is for `plan --config`, not for a nested checkpoint")
              for name in ("search", "ranking", "score", "train") if getattr(arguments, name) and nested]  # fmt: skip
    if arguments.gpus is None and arguments.gpu_memory is not None:
        found.append(Problem("--gpu-memory", "belongs to --gpus N; give that, or leave it out"))
    if arguments.gpus is not None and (nested or arguments.search):
        found.append(Problem("--gpus", f"lays out a configured run; leave out {'NESTED' if nested else '--search'}"))
    if arguments.gpus is not None and arguments.gpus < 1:
        found.append(Problem("--gpus", f"{arguments.gpus} must be above 0"))
    if arguments.gpus is not None and arguments.gpus > MOST_GPUS:
        found.append(Problem("--gpus", f"{arguments.gpus} must be at most {MOST_GPUS:,}"))
    if arguments.gpu_memory is not None and not 0 < arguments.gpu_memory < float("inf"):
        found.append(Problem("--gpu-memory", f"{arguments.gpu_memory:g} must be a number of GB above 0"))
    if arguments.train and arguments.search:
        found.append(Problem("--train", "shows a configured run; leave out --search"))
    if arguments.score and not (arguments.search and arguments.ranking):
        found.append(Problem("--score", "needs --search and --ranking RUN, with RUN/sorted in it"))
    return found


def _of_configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan, what training it will cost, and with `--train` the resolved run."""
    from ..family import Configured
    from ..plan.of_run import plan
    from ..plan.proposals import racing

    resolved, ranking = configuration(arguments), _depth_ranking(arguments)
    config = resolved.config
    if arguments.ranking and config.router.searches:
        from ..plan.proposals import with_searched_shapes

        with suppress(ProblemsError):  # the plan says it, too
            config = with_searched_shapes(config, arguments.ranking)
    family, candidates = None, {}
    with suppress(ProblemsError):  # the plan says it
        family = Configured(replace(resolved, config=config)).family(ranking)
        candidates = racing(config, family, arguments.ranking) if arguments.ranking else {}
    result = plan(config, ranking, family=family, racing=candidates)
    if family is None:
        return result | {"training": None} | ({"run": None} if arguments.train else {})
    from ..distill.training_cost import training_cost
    from ..distill.training_plan import training_plan

    subnets = {b["name"]: family.space.subnet_from_dict(b["subnet"]) for b in result["budgets"]}
    result["training"] = training_cost(config, family, subnets)
    if arguments.gpus is not None:
        from .plan_layouts import lay_out

        lay_out(arguments, result, config, family, subnets)
    return result | {"run": training_plan(config, family)} if arguments.train else result


def _depth_ranking(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    if not arguments.ranking:
        return None
    from ..config.model_fields import architecture_of
    from ..shapes.damage import read_scores

    return read_scores(arguments.ranking, architecture_of(configuration(arguments).config.model)).depth_ranking


def _proposals(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..plan.proposals import best_of_each, measured_order, parse_method, search

    resolved, method = configuration(arguments), parse_method(arguments.search)
    if arguments.output and method.count > 1:
        words = f"takes one subnet per budget, --search {arguments.search} proposes {method.count}; use random:1"
        raise ProblemsError([Problem("--output", words)])
    result = search(resolved.config, method, arguments.ranking)
    if method.name == "measured":
        _score(arguments, resolved, result, chooses=True)
        measured_order(result)
    if arguments.output and not result["budgets"]:
        raise ProblemsError([Problem("--output", "every budget is the parent or has its subnet; nothing to write")])
    _write(arguments, best_of_each(result))
    if arguments.score and method.name != "measured":
        _score(arguments, resolved, result)
    return result


def _score(arguments: argparse.Namespace, resolved: Any, result: dict[str, Any], *, chooses: bool = False) -> None:
    """Held-out loss of every proposal, cut from the sorted parent without any training.

    Args:
        chooses: on other windows than those that losses are reported on.
    """
    run = Path(arguments.ranking)
    run = run.parent if run.name == "importance" else run
    if not (run / "sorted").is_dir():
        words = f"needs a sorted parent at {str(run / 'sorted')!r}; run `nemo-elastic sort --out {run}`"
        raise ProblemsError([Problem("--search" if chooses else "--score", words)])
    from .console import quiet_libraries

    quiet_libraries(arguments.verbose)
    from ..family import Configured
    from ..importance.store import Importance
    from ..nemo.pipeline import Run

    configured = Configured(resolved)
    family = configured.family()
    keyed = {str(i): family.space.subnet_from_dict(b["subnet"]) for i, b in enumerate(result["budgets"])}
    scored = Run(configured, run)
    scored.check_sorted(Importance.load(run / "importance", family.architecture))
    losses = scored.zero_shot(run / "sorted", keyed, chooses=chooses)
    for i, row in enumerate(result["budgets"]):
        row["heldout_loss"] = losses[str(i)]


def _of_nested(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    from ..checkpoint.manifest import load_manifest
    from ..plan.of_nested import plan_nested

    if not (Path(folder).expanduser() / "elastic").is_dir():
        words = (
            "is no nested checkpoint and no parent: give the folder of a Hugging Face download, of a NeMo checkpoint, "
        )
        words += "or of a nested one" + ("" if Path(folder).exists() else "; nothing is there (nothing is downloaded)")
        raise ProblemsError([Problem(folder, words)])
    result = plan_nested(load_manifest(folder), arguments.budget, overrides(arguments))
    _write(arguments, result)
    return result


def _write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """`--output`, where it was asked for."""
    if not arguments.output:
        return
    from ..plan.of_nested import write_subnets

    out = Path(arguments.output)
    if out.exists() and not arguments.force:
        raise ProblemsError([Problem("--output", f"{str(out)!r} is there already; replace it with --force")])
    if out.is_dir():
        raise ProblemsError([Problem("--output", f"{str(out)!r} is a folder; name a file")])
    raise_if_any(folder_problems("--output", out.parent))
    write_subnets(out, result)
