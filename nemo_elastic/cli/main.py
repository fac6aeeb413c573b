"""`nemo-elastic <verb>`: parses, runs the verb, turns bad input into one clear message and exit code 2.

JSON (and what a verb answers) goes to stdout, progress and logs to stderr; libraries that print to stdout are sent to
stderr too, so that stdout can be piped. Verbs import what they need when they run, so that `plan` starts at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..problems import Problem, ProblemsError, Stopped
from ..processes.launchers import launcher_problems
from .console import Stdout, show_problems

PATHS = ("config", "out", "output", "ranking", "subnet", "hf_python")  # flags that name files: ~ is the user's folder
VERBS = (
    "plan",
    "config",
    "data",
    "rank",
    "sort",
    "train",
    "nest",
    "profile",
    "extract",
    "verify",
    "generate",
    "report",
    "quickstart",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="nemo-elastic",
        description="One training run, one checkpoint, several children of a hybrid Mamba-attention model.",
        epilog="Start with `nemo-elastic quickstart`, or `nemo-elastic plan --config conf/nemotron_nano_12b_v2.yaml`.",
    )
    parser.add_argument("--version", action="version", version=f"nemo-elastic {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f".{verb}", __package__).add_parser(subparsers)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The words of a command line; folders and overrides may stand on both sides of a flag, which argparse refuses."""
    parser = build_parser()
    arguments, others = parser.parse_known_args(argv)
    if flags := [word for word in others if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.words += others
    for name in PATHS:
        if isinstance(given := getattr(arguments, name, None), str):
            setattr(arguments, name, os.path.expanduser(given))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted, 143 stopped."""
    arguments = parse(argv)
    with Stdout() as answer:
        arguments.answer = answer
        if lost := launcher_problems(os.environ):
            show_problems(ProblemsError(lost), verb=arguments.verb, everywhere=True)
            return 2
        try:
            return arguments.run(arguments)
        except (ProblemsError, ValueError) as error:
            show_problems(error, verb=arguments.verb)
            return 2
        except OSError as error:  # a path that is too long, a full disk, a folder that is somebody else's
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            words = f"{error.strerror}; mend that, or give another path"
            show_problems(ProblemsError([Problem(str(error.filename or "--out"), words)]), verb=arguments.verb)
            return 2
        except Stopped as stopped:
            show_problems(ValueError(stopped), verb=arguments.verb)
            return 143
        except KeyboardInterrupt:
            sys.stderr.write("nemo-elastic: interrupted\n")
            return 130
