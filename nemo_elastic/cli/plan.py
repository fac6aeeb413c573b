"""`plan`: what every budget will be, on a laptop, in a second; and what a trained family has between its budgets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..problems import raise_if_any
from .arguments import folders, is_override, overrides, rather_a_folder, verb_parser
from .console import progress_bar, quiet_libraries

FLAGS_OF_PLAN = ("train", "gpus", "gpu_memory", "search", "ranking", "score", "budget", "output", "force")
EXAMPLES = """examples:
  nemo-elastic plan /models/my_parent                    # is it supported, and what a family of it could be
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --json report.sequence_length=32768 report.profile=fp8
  nemo-elastic plan --config conf/my_parent.yaml train.tensor_model_parallel_size=4
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --train report.mfu=0.4 report.peak_tflops=989
  nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml --gpus 64 --gpu-memory 80
  nemo-elastic plan --config conf/tiny_parent.yaml --search beam --ranking runs/tiny --score
  nemo-elastic plan --config conf/tiny_parent.yaml --search measured --ranking runs/tiny --json
  nemo-elastic plan runs/tiny/nested --budget 0.6 --output subnet.yaml
  nemo-elastic extract runs/tiny/nested --subnet subnet.yaml
  nemo-elastic plan --config conf/tiny_parent.yaml --search greedy --ranking runs/tiny --output shapes.yaml
  nemo-elastic plan runs/tiny/nested --budget memory_gb:12 report.sequence_length=131072

exit code 2 when the plan has problems; it is printed all the same"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    help = "sizes, parameters, memory, FLOPs and allowed parallel sizes of every budget, and what training will cost"
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
    from ..verbs.planning import Asked, answer, misplaced

    named = [str(Path(word).expanduser()) for word in arguments.words if not is_override(word)]
    asked = Asked(
        config=arguments.config,
        folder=named[0] if named and not arguments.config else None,
        overrides=tuple(overrides(arguments)),
        hint=rather_a_folder(overrides(arguments)),
        **{name: getattr(arguments, name) for name in FLAGS_OF_PLAN},
    )
    raise_if_any(misplaced(asked))
    folders(arguments, *([] if arguments.config else ["NESTED or PARENT"]), optional=0 if arguments.config else 1)
    if arguments.score or arguments.search == "measured":
        quiet_libraries(arguments.verbose)
    result = answer(asked, _heldout)
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


def _heldout(*what: Any) -> Any:
    from ..nemo.api.scores import heldout_losses

    with progress_bar() as bar:
        return heldout_losses(*what, progress=bar.update)
