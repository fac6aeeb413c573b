"""`data`: what training will read, before a GPU-hour is spent."""

from typing import Any

from ..config.load import Resolved
from ..data.entries import entry_problems
from ..data.of_run import text_tokenizer
from ..data.preview import LIMIT, preview
from ..problems import Problem, ProblemsError, raise_if_any


def read_ahead(resolved: Resolved, *, samples: int = 2, documents: int | None = None) -> dict[str, Any]:
    """The preview of a run's text as plain values (`data --json` prints exactly this).

    Args:
        samples: first samples to show.
        documents: of each source to tokenize at most; None: as many as take seconds; 0: all.

    Raises:
        ProblemsError: a source that cannot be read.
    """
    raise_if_any(entry_problems(resolved.config.data))
    limit = LIMIT if documents is None else documents
    try:
        return preview(resolved.config, text_tokenizer(resolved.config), limit=limit, samples=samples)
    except ProblemsError:
        raise
    except ValueError as error:
        words = str(error).removeprefix("data.paths: ").removeprefix("data: ")
        raise ProblemsError([Problem("data", words)]) from error


def count_problems(samples: int, documents: int | None) -> list[Problem]:
    """Counts below 0."""
    given = {"--samples": samples, "--documents": documents or 0}
    return [Problem(name, f"{value} must be at least 0") for name, value in given.items() if value < 0]
