"""Held-out loss of subnets that nobody has trained: `plan --search --score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_elastic.family import Configured
from nemo_elastic.processes.progress import Progress
from nemo_elastic.space.subnet import Subnet


def heldout_losses(
    configured: Configured,
    run: Path,
    subnets: Mapping[str, Subnet],
    chooses: bool = False,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Nats per token of each, cut from the run's sorted parent.

    Args:
        chooses: on the windows that shapes are chosen by, not on those that losses are reported on.

    Raises:
        ProblemsError: a sorted parent of other scores than the run's.
    """
    from nemo_elastic.importance.store import Importance
    from nemo_elastic.nemo.pipeline import Run

    scored = Run(configured, run, progress)
    scored.check_sorted(Importance.load(run / "importance", configured.family().architecture))
    return scored.zero_shot(run / "sorted", subnets, chooses=chooses)
