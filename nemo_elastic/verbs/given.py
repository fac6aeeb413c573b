"""The configuration that a verb is given: a file, the name of a shipped one, or one that has been read already."""

from collections.abc import Sequence
from pathlib import Path

from ..config.load import Resolved, load_config
from ..family import Configured
from ..problems import Problem, ProblemsError

Given = str | Path | Resolved | Configured


def resolved_of(given: Given | None, overrides: Sequence[str] = (), hint: str = "") -> Resolved:
    """What was given, checked.

    Args:
        hint: what to add where nothing was given.

    Raises:
        ProblemsError: nothing given, anything wrong in it, or overrides of what has been read.
    """
    if given is None:
        raise ProblemsError([Problem("--config", f"is required; e.g. --config conf/tiny_parent.yaml{hint}")])
    overrides = words_of(overrides)
    if isinstance(given, str | Path):
        return load_config(Path(given).expanduser() if str(given).startswith("~") else given, overrides)
    if overrides:
        words = f"{' '.join(overrides)} cannot change a configuration that has been read; give its file instead"
        raise ProblemsError([Problem("overrides", words)])
    return given.resolved if isinstance(given, Configured) else given


def words_of(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides.

    Raises:
        ProblemsError: one text, whose letters would be taken for overrides.
    """
    if isinstance(overrides, str):
        words = f"{overrides!r} must be a list of words, as in ['train.micro_batch_size=2']"
        raise ProblemsError([Problem("overrides", words)])
    return tuple(overrides)


def configured_of(given: Given | None, overrides: Sequence[str] = ()) -> Configured:
    """The same with the families it means.

    Raises:
        ProblemsError: as `resolved_of`.
    """
    resolved = resolved_of(given, overrides)
    return given if isinstance(given, Configured) else Configured(resolved)


def run_folder(out: str | Path | None, name: str) -> Path:
    """`out`, or `runs/<name>`."""
    return Path(out).expanduser() if out else Path("runs") / name
