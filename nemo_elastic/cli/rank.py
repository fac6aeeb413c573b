"""`rank`: importance of widths and layers of a parent, at any parallel layout -> `OUT/importance/`."""

from __future__ import annotations

import argparse
from typing import Any

from ..family import Configured
from .arguments import configuration, folders, run_folder, start_workers, verb_parser
from .console import progress_bar, quiet_libraries

EXAMPLES = """examples:
  nemo-elastic rank --config conf/tiny_parent.yaml
  nemo-elastic rank --config conf/my_parent.yaml --resume rank.samples=1024 rank.depth=one_shot
  torchrun --nproc-per-node 8 -m nemo_elastic rank --config conf/x.yaml train.tensor_model_parallel_size=8

--resume goes on after an interruption, with the same layout; at most one batch is repeated"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    flags = ("--config", "--out", "--json", "--resume", "--nproc", "--verbose")
    verb_parser(subparsers, "rank", run, "importance of widths and layers -> OUT/importance/", flags, epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Rank as the configuration says."""
    folders(arguments)
    resolved = configuration(arguments)
    out = run_folder(arguments, resolved.config.name)
    quiet_libraries(arguments.verbose)
    from ..nemo.run.start_checks import check_rank
    from ..processes.launchers import started_processes

    configured = Configured(resolved)
    check_rank(configured, out, started_processes() if arguments.nproc is None else arguments.nproc)
    start_workers(arguments)
    from ..nemo import api

    with progress_bar() as bar:
        done = api.rank(configured, out, resume=arguments.resume, progress=bar.update)
    result = {"importance": str(done.folder), **summary(done.importance)}
    if arguments.json:
        arguments.answer.json(result)
    else:
        arguments.answer.write(as_text(result))
    return 0


def summary(importance: Any) -> dict[str, Any]:
    """What `rank` says of its result."""
    kept = ("removed", "layer_forwards", "naive_layer_forwards", "seconds", "parallel")
    return {
        "depth_ranking": list(importance.depth_ranking),
        "depth_scores": {str(layer): score for layer, score in importance.depth_scores.items()},
        **{name: importance.provenance[name] for name in kept if name in importance.provenance},
    }


def as_text(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"importance: {result['importance']} ({result['seconds']} s)",
        f"layers, most important first: {' '.join(map(str, result['depth_ranking']))}",
        f"layers that go first: {' '.join(map(str, result['removed'])) or 'none'}",
    ]
    if "layer_forwards" in result:
        done, naive = result["layer_forwards"], result["naive_layer_forwards"]
        lines.append(f"layer forwards: {done} instead of {naive} ({naive / done:.2f} times fewer)")
    return "\n".join(lines)
