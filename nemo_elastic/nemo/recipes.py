"""NeMo-Run's face of the package: `nemo elastic <verb> --factory <recipe>`, for the verbs that run long.

NeMo-Run imports this module before it reads its command line (entry point group `nemo_run.cli`), so nothing heavy is
imported here; its parser knows `Optional[str]`, not `str | None`. A recipe is a `run.Partial` of a verb: every argument
can be overridden, and any executor can run it. What a configuration and its overrides have wrong is said when the
command line is read, before anything is printed or launched, with `--dryrun` too.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from nemo_run.cli.api import RunContext, RunContextError

Text = Optional[str]  # noqa: UP045
Words = Optional[list[str]]  # noqa: UP045


class Checked(RunContext):
    """Reads a verb's arguments and checks the configuration that they name."""

    def parse_fn(self, fn: Callable, args: list[str], **defaults: Any) -> Any:
        """The `run.Partial` of the command line.

        Raises:
            RunContextError: everything that is wrong with configuration and overrides.
        """
        partial = super().parse_fn(fn, args, **defaults)
        _check(partial)
        return partial


def _check(partial: Any) -> None:
    from nemo_elastic.problems import Problem, ProblemsError
    from nemo_elastic.verbs.given import configured_of

    words, nested = partial.overrides or [], getattr(partial, "nested", None)
    takes = "nested" in inspect.signature(partial.__fn_or_cls__).parameters
    try:
        if takes and nested is None:
            raise ProblemsError([Problem("nested", "is missing: the folder of a nested checkpoint, nested=RUN/nested")])
        if nested is None:
            configured_of(getattr(partial, "config", None), words).family()
        else:
            _check_nested(Path(nested).expanduser(), words, budget=getattr(partial, "budget", None))
    except ProblemsError as error:
        said = "\n  ".join(" ".join(str(problem).split()) for problem in error.problems)
        raise RunContextError(f"{len(error.problems)} to mend\n  {said}") from error


def _check_nested(nested: Path, words: list[str], budget: str | None) -> None:
    """A budget's name and overrides. Where an earlier task has yet to write the checkpoint, only names of keys."""
    from nemo_elastic.checkpoint.manifest import load_manifest
    from nemo_elastic.config import load_config

    if not (nested / "elastic").is_dir():
        load_config("tiny_parent.yaml", words)
        return
    manifest = load_manifest(nested)
    if budget is not None:
        manifest.subnet(budget)
    load_config(None, words, base={**(manifest.provenance.get("config") or {}), "model": dict(manifest.model)})


def verb(function: Callable) -> Callable:
    """`nemo elastic <function's name>`."""
    return run.cli.entrypoint(function, namespace="elastic", run_ctx_cls=Checked)


@verb
def quickstart(
    config: str = "tiny_parent.yaml", out: Text = None, force: bool = False, overrides: Words = None
) -> None:
    """Rank, train, extract, verify and report; by default the parent that ships with the package.

    Args:
        config: a YAML file, or the name of a shipped one.
        out: run folder.
        force: replace what an earlier run left there.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    api.quickstart(config, out, overrides=overrides or [], force=force)


@verb
def train(config: str, out: Text = None, resume: bool = False, force: bool = False, overrides: Words = None) -> None:
    """The elastic run: one training, one nested checkpoint in OUT/nested.

    Args:
        config: a YAML file, or the name of a shipped one.
        out: run folder.
        resume: go on where an interrupted run stopped.
        force: replace what an earlier run left there.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    api.train(config, out, overrides=overrides or [], resume=resume, force=force)


@verb
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


@verb
def sort(config: str, out: Text = None, force: bool = False, overrides: Words = None) -> None:
    """The parent sorted by importance -> OUT/sorted.

    Args:
        config: a YAML file, or the name of a shipped one.
        out: run folder, with importance/ in it.
        force: replace what is there.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    api.sort(config, out, overrides=overrides or [], force=force)


@verb
def profile(config: str, output: str, force: bool = False, overrides: Words = None) -> None:
    """Latency table of layer kinds and widths on the machine that runs it.

    Args:
        config: a YAML file, or the name of a shipped one.
        output: the table, a YAML file.
        force: replace it.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    api.profile(config, output, overrides=overrides or [], force=force)


@verb
def extract(
    nested: str,
    out: Text = None,
    budget: Text = None,
    format: str = "nemo",
    force: bool = False,
    overrides: Words = None,
) -> None:
    """Children out of a nested checkpoint: all, or one.

    Args:
        nested: the nested checkpoint.
        out: folder of the children.
        budget: one budget of the family.
        format: nemo, hf or gguf.
        force: replace what is there.
        overrides: export.key=value words.
    """
    from nemo_elastic.nemo import api

    api.extract(nested, out, budget=budget, format=format, overrides=overrides or [], force=force)


@verb
def verify(nested: str, format: str = "nemo", python: Text = None, overrides: Words = None) -> None:
    """Children against their nested subnets; fails where one differs.

    Args:
        nested: the nested checkpoint, beside its children.
        format: nemo, hf or gguf.
        python: for hf a Python with transformers 5, for gguf one with xllamacpp.
        overrides: dotted.key=value words.
    """
    from nemo_elastic.nemo import api

    pythons = {f"{format}_python": python} if python and format != "nemo" else {}
    found = api.verify(nested, format=format, overrides=overrides or [], **pythons)
    if not found.ok:
        differ = ", ".join(check.budget for check in found.checks if not check.ok)
        raise SystemExit(f"{nested}: verification FAILED: {differ}")


# Recipes of the verbs that read a configuration.


def _recipes(verb: Callable, name: str, config: str, words: str) -> None:
    def recipe() -> run.Partial:
        return run.Partial(verb, config=config)

    recipe.__doc__, recipe.__name__ = words, f"{verb.__name__}_{name}"
    run.cli.factory(recipe, target=verb, name=name)


NANO = "(set parent.path by overrides)"
for _verb in (train, rank, sort):
    _recipes(_verb, "tiny_parent", "tiny_parent.yaml", "The family of the tiny parent that ships with the package.")
    _recipes(_verb, "tiny_experts", "tiny_experts.yaml", "The family of the tiny parent with experts.")
    _recipes(_verb, "nemotron_nano_12b_v2", "nemotron_nano_12b_v2.yaml", f"Nemotron Nano 12B v2, 9B and 6B {NANO}.")
