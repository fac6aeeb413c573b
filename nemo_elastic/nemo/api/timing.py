"""`profile`: a latency table of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_elastic.config.function_fields import ROUTING, arithmetic_of
from nemo_elastic.files import output_problems
from nemo_elastic.nemo.api.environment import on_first, own_processes
from nemo_elastic.nemo.api.results import Profiled
from nemo_elastic.problems import Problem, raise_if_any
from nemo_elastic.processes.progress import Progress
from nemo_elastic.verbs.given import Given, configured_of


def profile(
    config: Given,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    rounds: int = 3,
    repeats: int = 5,
    warm_up: int = 3,
    points: int = 5,
    force: bool = False,
    progress: Progress | None = None,
) -> Profiled:
    """How long layers of every kind and width take on this machine -> a table that latency budgets read.

    Args:
        output: the file that `report.latency_table` will name.
        rounds, repeats, warm_up: times all points are gone through, timings of a point in each, runs before the first.
        points: sizes per dim; others are interpolated.

    Raises:
        ProblemsError: bad input, or a file in the way.
    """
    own_processes()
    configured, file = configured_of(config, overrides), Path(output).expanduser()
    lowest = {"repeats": (repeats, 1), "rounds": (rounds, 1), "warm_up": (warm_up, 0), "points": (points, 2)}
    found = [
        Problem(f"--{name.replace('_', '-')}", f"{value} must be at least {least}")
        for name, (value, least) in lowest.items()
        if value < least
    ]
    raise_if_any([*found, *output_problems("--output", file, force=force)])
    family, report = configured.family(), configured.config.report
    from nemo_elastic.mcore.models.profile import Timing
    from nemo_elastic.mcore.models.profile import profile as measure
    from nemo_elastic.mcore.runtime.automatic import settled

    heard, half = on_first(progress), settled(configured.config).train.precision == "bf16-mixed"
    arithmetic = arithmetic_of(configured.config.model)
    timing = Timing(
        batch_size=report.batch_size,
        sequence_length=report.sequence_length,
        dtype=torch.bfloat16 if half else torch.float32,
        function={n: v for n, v in arithmetic.items() if n in ("activation_func", *ROUTING)},
        warm_up=warm_up,
        repeats=repeats,
        rounds=rounds,
    )
    table = measure(
        family.space,
        timing,
        points=points,
        report=lambda kind, done, total: heard("profile", done, total, kind),
    )
    table.write(file)
    return Profiled(file, table)
