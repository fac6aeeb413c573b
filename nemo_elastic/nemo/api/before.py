"""`plan`, `config`, `data`: what can be known before a run. Seconds, and no Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nemo_elastic.config import Resolved
from nemo_elastic.nemo.api.environment import on_first
from nemo_elastic.nemo.api.planned import Plan, TextPreview
from nemo_elastic.nemo.api.scores import heldout_losses
from nemo_elastic.plan.starting import starting_configuration
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any
from nemo_elastic.processes.progress import Progress
from nemo_elastic.verbs.given import Given, resolved_of, words_of
from nemo_elastic.verbs.planning import Asked, answer
from nemo_elastic.verbs.reading import count_problems, read_ahead


def config(config: Given, *, overrides: Sequence[str] = ()) -> Resolved:
    """A configuration, checked: its sections, its plain values, and where each came from.

    Args:
        config: a YAML file, or the name of a shipped one.
        overrides: `dotted.key=value` words.

    Raises:
        ProblemsError: everything that is wrong in it, at once.
    """
    return resolved_of(config, overrides)


def starting_config(parent: str | Path) -> str:
    """The YAML to start from for a parent: a Hugging Face folder, a NeMo checkpoint, `builtin:tiny_parent`.

    Raises:
        ProblemsError: nothing there, or a model that cannot be made elastic, and why.
    """
    return starting_configuration(str(parent))


def plan(
    config: Given | None = None,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    train: bool = False,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    search: str | None = None,
    ranking: str | Path | None = None,
    score: bool = False,
    budget: float | str | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What every budget will be; or what a nested checkpoint has for any budget; or what a parent's family could be.

    Args:
        config: of a run that is to be planned; or else
        folder: a parent's, or a nested checkpoint's.
        train: say the resolved run too (`values["run"]`).
        gpus, gpu_memory: layouts over so many GPUs of so many GB, the fastest first (`values["layouts"]`).
        search: `uniform`, `random:N`, `greedy`, `beam` or `measured`; all but the first two need the scores of
        ranking: a folder that `rank` wrote.
        score: held-out losses of what the search found; needs the sorted parent there.
        budget: of a nested checkpoint: 0.6, a number of parameters, `KIND:VALUE`, or a trained budget's name.
        output: a file for the subnets, to force in a run or to extract; `force` replaces it.
        progress: is told of `score`, which is all that takes long here.

    Raises:
        ProblemsError: bad input. What makes a plan that cannot be run is in its `problems` instead.
    """
    if config is not None and folder is not None:
        words = "is planned by itself; leave the configuration out, or the folder"
        raise ProblemsError([Problem(str(folder), words)])
    asked = Asked(
        config=config,
        folder=_path(folder),
        overrides=words_of(overrides),
        train=train,
        gpus=gpus,
        gpu_memory=gpu_memory,
        search=search,
        ranking=_path(ranking),
        score=score,
        budget=None if budget is None else str(budget),
        output=_path(output),
        force=force,
    )
    return Plan.of(answer(asked, partial(heldout_losses, progress=on_first(progress))))


def data(
    config: Given, *, overrides: Sequence[str] = (), samples: int = 2, documents: int | None = None
) -> TextPreview:
    """What training will read: tokens, lengths and epochs of every source, and the first samples with their loss.

    Args:
        samples: how many of the first samples to decode.
        documents: of each source to tokenize at most; None: as many as take seconds; 0: all.

    Raises:
        ProblemsError: bad input, or a source that cannot be read.
    """
    raise_if_any(count_problems(samples, documents))
    return TextPreview.of(read_ahead(resolved_of(config, overrides), samples=samples, documents=documents))


def _path(given: str | Path | None) -> str | None:
    return None if given is None else str(Path(given).expanduser())
