"""NeMo-Run's face of the package: `nemo elastic <verb> --factory <recipe>`.

NeMo-Run imports this module before it reads its command line (entry point group `nemo_run.cli`), so nothing heavy is
imported here; its parser knows `Optional[str]`, not `str | None`. A recipe is a `run.Partial` of a verb: every argument
can be overridden, and any executor can run it.
"""

from typing import Optional

import nemo_run as run

Text = Optional[str]  # noqa: UP045
Words = Optional[list[str]]  # noqa: UP045


@run.cli.entrypoint(namespace="elastic")
def train(config: str, out: Text = None, resume: bool = False, overrides: Words = None) -> None:
    """The elastic run: one training, one nested checkpoint in OUT/nested.

    Args:
        config: a YAML file, or the name of a shipped one.
        out: run folder.
        resume: go on where an interrupted run stopped.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    api.train(config, out, overrides=overrides or [], resume=resume)


@run.cli.entrypoint(namespace="elastic")
def rank(config: str, out: Text = None, resume: bool = False, overrides: Words = None) -> None:
    """Importance of widths and layers of a parent -> OUT/importance.

    Args:
        config: a YAML file, or the name of a shipped one.
        out: run folder.
        resume: go on after an interruption.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    api.rank(config, out, overrides=overrides or [], resume=resume)


@run.cli.factory(target=train, name="tiny_parent")
def train_tiny_parent() -> run.Partial:
    """The family of the tiny parent that ships with the package."""
    return run.Partial(train, config="tiny_parent.yaml")


@run.cli.factory(target=train, name="nemotron_nano_12b_v2")
def train_nemotron_nano_12b_v2() -> run.Partial:
    """The paper's family: Nemotron Nano 12B v2 with 9B and 6B children (set parent.path by overrides)."""
    return run.Partial(train, config="nemotron_nano_12b_v2.yaml")


@run.cli.factory(target=rank, name="tiny_parent")
def rank_tiny_parent() -> run.Partial:
    """Importance of the tiny parent."""
    return run.Partial(rank, config="tiny_parent.yaml")


@run.cli.factory(target=rank, name="nemotron_nano_12b_v2")
def rank_nemotron_nano_12b_v2() -> run.Partial:
    """Importance of Nemotron Nano 12B v2 (set parent.path by overrides)."""
    return run.Partial(rank, config="nemotron_nano_12b_v2.yaml")
