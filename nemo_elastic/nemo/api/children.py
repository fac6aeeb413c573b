"""`extract`, `generate`, `report`: what a nested checkpoint and a run folder give away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemo_elastic.nemo.api.environment import on_first
from nemo_elastic.nemo.api.results import Extracted, Report
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any
from nemo_elastic.processes.progress import Progress
from nemo_elastic.verbs import extracting, generating
from nemo_elastic.verbs.given import words_of

if TYPE_CHECKING:
    from nemo_elastic.serving import Completion
    from nemo_elastic.serving.requests import Piece


def extract(
    nested: str | Path,
    out: str | Path | None = None,
    *,
    budget: str | None = None,
    subnet: str | Path | None = None,
    whole: bool = False,
    format: str = "nemo",
    hf_schema: str | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Children out of a nested checkpoint, without any training: every budget, unless one is named.

    Args:
        out: of one budget its folder, else the folder of all of them (default: `children/` beside `nested`).
        budget: one of the family.
        subnet: a file that `plan(folder=nested, budget=..., output=...)` wrote: its children instead.
        whole: with `format="hf"`: one folder with the parent and a script that cuts any budget out of it.
        format: `nemo`, `hf` or `gguf`.
        hf_schema: how a Hugging Face folder says sizes that differ per layer: `uniform`, `list`, `per_layer_config`.
        dtype: cast the weights: `bfloat16`, `float32`, or `float16` (gguf only).
        overrides: `export.key=value` words.
        force: replace what is at the target.

    Raises:
        ProblemsError: bad input, a child that the format cannot say, or a folder in the way.
    """
    every = not (budget or subnet or whole)
    wanted = extracting.Wanted(
        budget=budget,
        all=every,
        subnet=None if subnet is None else str(Path(subnet).expanduser()),
        nested=whole,
        format=format,
        hf_schema=hf_schema,
        dtype=dtype,
        overrides=words_of(overrides),
    )
    return extract_wanted(nested, out, wanted, force=force, progress=progress)


def extract_wanted(
    nested: str | Path,
    out: str | Path | None,
    wanted: extracting.Wanted,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """`extract`, asked in the command line's words.

    Raises:
        ProblemsError: as `extract`.
    """
    raise_if_any(wanted.problems())
    from nemo_elastic.nemo.export.checkpoints import extract as extract_one
    from nemo_elastic.nemo.export.checkpoints import extract_all, open_nested
    from nemo_elastic.nemo.export.hf_nested import extract_hf_nested
    from nemo_elastic.plan.of_nested import with_subnets

    opened, heard = open_nested(_home(nested)), on_first(progress)
    if wanted.subnet:
        opened = replace(opened, manifest=with_subnets(opened.manifest, wanted.subnet))
    export = wanted.export(opened.manifest)
    how = {
        "hf_schema": export.hf_schema,
        "dtype": getattr(torch, export.dtype) if export.dtype else None,
        "force": force,
    }
    if wanted.nested:
        target = _home(out) if out else opened.path.parent / "hf_nested"
        extract_hf_nested(opened, target, **how)
        heard("extract", 1, 1)
        return Extracted("hf", dict.fromkeys(opened.manifest.subnets, target))
    base = _home(out) if out else opened.path.parent / "children"
    if wanted.budget:
        folders = {wanted.budget: base if out else base / wanted.budget}
        extract_one(opened, wanted.budget, folders[wanted.budget], format=wanted.format, **how)
    else:
        folders = extract_all(
            opened,
            base,
            progress=lambda name, done, total: heard("extract", done, total, name),
            format=wanted.format,
            **how,
        )
    heard("extract", len(folders), len(folders))
    return Extracted(wanted.format, folders)


def generate(
    nested: str | Path,
    prompt: str,
    *,
    budget: str | None = None,
    think: str | None = None,
    answer: str | None = None,
    until: str | None = None,
    think_tokens: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    device: str = "cpu",
    stream: Callable[[Piece], None] | None = None,
) -> Completion:
    """A prompt continued by a budget of a nested checkpoint, or by one that thinks and one that answers.

    The weights are read for each call: for many prompts, `nemo_elastic.serving` keeps them.

    Args:
        budget: who continues; or else
        think, answer: who begins, and who goes on from there to the end.
        until, think_tokens: what ends the thinking (`</think>`), and after how many tokens it ends at the latest.
        temperature: 0: the likeliest token; else drawn, among `top_k`, by `seed`.
        stop: texts that end the answer.
        device: `cpu`, in fp32, or `cuda`.
        stream: called with every new token.

    Raises:
        ProblemsError: all that is wrong with what is asked, or a checkpoint without a tokenizer.
    """
    wanted = generating.Wanted(
        prompt=prompt, budget=budget, think=think, answer=answer, until=until, think_tokens=think_tokens,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop=tuple(stop),
    )  # fmt: skip
    raise_if_any(wanted.problems())
    from nemo_elastic.checkpoint.manifest import load_manifest

    folder = _home(nested)
    raise_if_any(wanted.budget_problems(load_manifest(folder).subnets))
    from nemo_elastic.data.tokenizer import BPETokenizer
    from nemo_elastic.serving import ElasticFamily, Phase, Request, complete, think_then_answer

    if device not in ("cpu", "cuda"):
        raise ProblemsError([Problem("--device", f"{device!r} must be one of cpu, cuda")])
    if device == "cuda" and not torch.cuda.is_available():
        raise ProblemsError([Problem("--device", "cuda: torch sees no GPU here; leave it out to run on the CPU")])
    family = ElasticFamily.load(folder, device=device, dtype=torch.float32 if device == "cpu" else None)
    if family.tokenizer is None:
        raise ProblemsError([Problem(str(nested), "has no tokenizer in context/; write it again with `nest`")])
    tokenizer = BPETokenizer(family.tokenizer)
    if budget:
        phases: tuple[Phase, ...] = (Phase(budget=budget),)
    else:
        mark = generating.UNTIL if until is None else until
        phases = think_then_answer(str(think), str(answer), until=mark, max_tokens=think_tokens)
    ids = tokenizer.encode_markers(prompt)
    if not ids:
        raise ProblemsError([Problem("--prompt", "has no tokens; give a text to continue")])
    request = Request(
        prompt=ids,
        phases=phases,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop=(tokenizer.eod, *stop),
    )
    (found,) = complete(family, [request], stream=stream, compact=True)
    return found


def report(out: str | Path, *, evaluations: str | Path | None = None) -> Report:
    """HTML, PNG and CSV of a run -> `OUT/report/`. Works at any moment of a run.

    Args:
        out: the run folder.
        evaluations: results of lm-evaluation-harness (default: `OUT/evaluations`, where it exists).

    Raises:
        ProblemsError: `out` holds nothing of a run, or `evaluations` no results.
    """
    from nemo_elastic.report.run_folder import read_run
    from nemo_elastic.report.write import write_report

    folder, scores = _home(out), None if evaluations is None else _home(evaluations)
    page = write_report(folder, scores)
    files = sorted(path.name for path in page.parent.iterdir() if path.suffix in (".html", ".png", ".csv"))
    return Report(page, tuple(files), read_run(folder, scores).missing)


def _home(path: str | Path) -> Path:
    return Path(path).expanduser()
