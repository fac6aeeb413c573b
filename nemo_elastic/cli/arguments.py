"""Flags that verbs share, and how a command line splits into folders and dotted overrides.

A positional word `key=value` is an override (`train.micro_batch_size=2`), any other is a folder; a key has no slash, so
that `checkpoints/step=99` is a folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Resolved
from ..problems import Problem, ProblemsError
from ..verbs.given import resolved_of
from .launch import launch

FLAGS: dict[str, dict[str, Any]] = {
    "--config": {"metavar": "YAML", "help": "configuration file, or the name of a shipped one"},
    "--out": {"metavar": "DIR", "help": "run folder (default: runs/<name>)"},
    "--json": {"action": "store_true", "help": "answer as JSON on stdout"},
    "--budget": {"metavar": "NAME", "help": "one budget of the family"},
    "--all": {"action": "store_true", "help": "every budget of the family"},
    "--format": {
        "choices": ("nemo", "hf", "gguf"),
        "default": "nemo",
        "help": "NeMo checkpoint, Hugging Face folder, or GGUF file for llama.cpp",
    },
    "--hf-python": {"metavar": "PYTHON", "help": "a Python with transformers 5, for --format hf (default: this one)"},
    "--gguf-python": {"metavar": "PYTHON", "help": "a Python with xllamacpp, for --format gguf (default: this one)"},
    "--resume": {"action": "store_true", "help": "go on where an interrupted run stopped"},
    "--force": {"action": "store_true", "help": "replace what is at the target"},
    "--nproc": {"type": int, "metavar": "N", "help": "start N processes on this machine"},
    "--verbose": {"action": "store_true", "help": "show what the libraries log"},
}


def verb_parser(subparsers: Any, name: str, run: Any, help: str, flags: tuple[str, ...], **more: Any) -> Any:
    """A verb's parser with shared flags and the positional words."""
    parser = subparsers.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter, **more
    )
    for flag in flags:
        parser.add_argument(flag, **FLAGS[flag])
    parser.add_argument("words", nargs="*", metavar="FOLDER | key=value", help="folders, and dotted overrides")
    parser.set_defaults(run=run)
    return parser


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The dotted overrides."""
    return [word for word in arguments.words if is_override(word)]


def is_override(word: str) -> bool:
    """True for `key=value`."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key


def folders(arguments: argparse.Namespace, *names: str, optional: int = 0) -> list[str]:
    """The folders, as many as named (the last `optional` may lack).

    Raises:
        ProblemsError: too few or too many.
    """
    found = [str(Path(word).expanduser()) for word in arguments.words if not is_override(word)]
    if not len(names) - optional <= len(found) <= len(names):
        wanted = " ".join(names) or "none"
        words = f"{len(found)} given ({' '.join(found) or 'none'}), wanted: {wanted}; overrides are written key=value"
        words += rather_a_folder(overrides(arguments))
        if files := [word for word in found if word.endswith((".yaml", ".yml"))]:
            words += f"; a configuration is given as --config {files[0]}" if hasattr(arguments, "config") else ""
        raise ProblemsError([Problem("folders", words)])
    return found


def rather_a_folder(words: Sequence[str]) -> str:
    """What to add to a message where an override has the looks of a folder."""
    paths = [word for word in words if "/" in word or Path(word).exists()]
    return f"; a folder with = in its name is written ./{paths[0]}" if paths else ""


def configuration(arguments: argparse.Namespace, default: str | None = None) -> Resolved:
    """The configuration that `--config` and the overrides give.

    Raises:
        ProblemsError: none named, or anything wrong in it.
    """
    hint = rather_a_folder(overrides(arguments))
    return resolved_of(arguments.config or default, overrides(arguments), hint)


def run_folder(arguments: argparse.Namespace, name: str) -> Path:
    """`--out`, or `runs/<name>`."""
    return Path(arguments.out) if arguments.out else Path("runs") / name


def start_workers(arguments: argparse.Namespace) -> None:
    """With `--nproc N`, run the same command in N processes and leave with their code; in one of them, return.

    Raises:
        ProblemsError: N below 1.
        SystemExit: the workers have ended.
    """
    count = getattr(arguments, "nproc", None)
    if count is None or "LOCAL_RANK" in os.environ:
        return
    if count < 1:
        raise ProblemsError([Problem("--nproc", f"{count} must be at least 1")])
    if count == 1:
        return
    arguments.answer.release()
    raise SystemExit(launch([sys.executable, "-m", "nemo_elastic", *sys.argv[1:]], count))
