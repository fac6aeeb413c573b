"""`verify`: children against their nested subnets, and a Hugging Face parent against transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_elastic.checkpoint.manifest import Manifest, load_manifest
from nemo_elastic.config import load_config
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.cost.counts import parameters
from nemo_elastic.nemo.api.environment import on_first, own_processes
from nemo_elastic.nemo.api.results import Pair, Verified
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.processes.progress import Progress
from nemo_elastic.verbs.given import words_of

if TYPE_CHECKING:
    from nemo_elastic.nemo.export.verify_parent import ParentCheck

HOLDS = {"nemo": "weights", "hf": "config.json", "gguf": "model.gguf"}  # what a child's folder has
# What text is held out of a parent's and how it is cut, where nobody says.
DEFAULTS = (
    "train.stages=[{steps: 1, seq_length: 256, global_batch_size: 4}]",
    "train.micro_batch_size=2",
    "train.val_samples=8",
)


def verify(
    nested: str | Path,
    child: str | Path | None = None,
    *,
    budget: str | None = None,
    format: str = "nemo",
    hf_python: str | None = None,
    gguf_python: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Verified:
    """Extracted children against their nested subnets, on real text: tensors, logits, loss, size, hashes.

    Args:
        child: one child's folder (default: all that lie beside `nested`).
        budget: which one it is, where its folder is not called so.
        format: of the children: `nemo`, `hf` or `gguf`.
        hf_python, gguf_python: a Python with transformers 5, or with xllamacpp; None: this one.
        overrides: of the run's configuration, as `train.tensor_model_parallel_size=2` under torchrun.

    Raises:
        ProblemsError: bad input, or a child that is missing or of another family.
        HashMismatch: a file of the nested checkpoint is not what its manifest says.
    """
    processes = own_processes()
    return Verification.of(
        nested, child, processes=processes, budget=budget, format=format, hf_python=hf_python,
        gguf_python=gguf_python, overrides=overrides,
    ).run(progress)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A `verify` that was looked at and can run."""

    nested: Path
    children: dict[str, Path]
    manifest: Manifest
    run_config: RunConfig
    format: str
    python: str | None

    @staticmethod
    def of(
        nested: str | Path,
        child: str | Path | None,
        *,
        processes: int,
        budget: str | None,
        format: str,
        hf_python: str | None,
        gguf_python: str | None,
        overrides: Sequence[str],
    ) -> Verification:
        """What `verify` is asked, checked without Megatron.

        Raises:
            ProblemsError: as `verify`.
        """
        if format not in HOLDS:
            raise ProblemsError([Problem("--format", f"{format!r} must be one of {', '.join(HOLDS)}")])
        if hf_python and format != "hf":
            raise ProblemsError([Problem("--hf-python", "runs children of --format hf; add that, or leave it out")])
        if gguf_python and format != "gguf":
            raise ProblemsError([Problem("--gguf-python", "runs children of --format gguf; add that, or leave it out")])
        folder = Path(nested).expanduser()
        manifest = load_manifest(folder)
        stored = dict(manifest.provenance.get("config") or {})
        if not stored:
            words = "its manifest holds no run configuration; it was not made by `train`"
            raise ProblemsError([Problem(str(nested), words)])
        config = load_config(None, words_of(overrides), base=_with_own_tokenizer(stored, folder)).config
        children = _children(folder, child, budget, list(manifest.subnets), format)
        from nemo_elastic.mcore.family.checks import check_processes

        check_processes(config, processes, trains=False)
        return Verification(
            nested=folder,
            children=children,
            manifest=manifest,
            run_config=config,
            format=format,
            python=gguf_python if format == "gguf" else hf_python,
        )

    def run(self, progress: Progress | None = None) -> Verified:
        """Compare.

        Raises:
            ProblemsError, HashMismatch: as `verify`.
        """
        from nemo_elastic.mcore.runtime import process_groups
        from nemo_elastic.nemo.export.results import note_verified
        from nemo_elastic.nemo.export.verify import KERNELS
        from nemo_elastic.nemo.export.verify import verify as compare
        from nemo_elastic.nemo.run.train import data_module, heldout_batches

        batches, heard = heldout_batches(data_module(self.run_config), self.run_config), on_first(progress)
        checks = compare(
            self.nested, self.children, self.run_config, batches, report=heard, format=self.format, python=self.python
        )
        if self.format == "nemo" and process_groups.rank() == 0 and _is_run(self.nested):
            note_verified(self.nested.parent, self.run_config, self.nested, checks)
        return Verified(tuple(checks), KERNELS[self.format], _pairs(self.manifest), len(self.manifest.files))


def verify_parent(
    parent: str,
    *,
    hf_python: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> ParentCheck:
    """A Hugging Face parent's held-out loss here against transformers', before anything is trained.

    Args:
        hf_python: a Python whose transformers knows the family; None: this one.
        overrides: `data.paths=[...]` for your own text.

    Raises:
        ProblemsError: no Hugging Face folder, no such Python, or a folder that transformers does not load whole.
    """
    path = str(parent).replace("'", "''")  # a YAML word
    config = load_config(None, [f"parent.path='{path}'", *DEFAULTS, *words_of(overrides)]).config
    from nemo_elastic.data.of_run import check_text
    from nemo_elastic.nemo.export.verify_parent import verify_parent as compare
    from nemo_elastic.nemo.run.train import data_module, heldout_batches

    check_text(config, trains=False)
    return compare(config, heldout_batches(data_module(config), config), hf_python, on_first(progress))


def _with_own_tokenizer(stored: dict[str, Any], nested: Path) -> dict[str, Any]:
    """The run's configuration with the tokenizer that travels in `context/`: the parent may have moved."""
    found = sorted((nested / "context").rglob("tokenizer.json"))
    return {**stored, "data": {**stored.get("data", {}), "tokenizer": str(found[0])}} if found else stored


def _is_run(nested: Path) -> bool:
    """Whether the folder around a nested checkpoint is the run that made it, and may be written in."""
    return (nested.parent / "config.json").is_file() and os.access(nested.parent, os.W_OK)


def _pairs(manifest: Manifest) -> tuple[Pair, ...]:
    by_size = sorted(manifest.subnets, key=lambda name: parameters(manifest.layout, manifest.subnets[name]))
    return tuple(Pair(a, b, manifest.subnets[a].is_nested_in(manifest.subnets[b])) for a, b in combinations(by_size, 2))


def _children(
    nested: Path, child: str | Path | None, budget: str | None, known: list[str], format: str
) -> dict[str, Path]:
    """budget -> folder."""
    if child is not None:
        folder = Path(child).expanduser()
        name = budget or folder.name
        if name not in known:
            words = f"{name!r} is no budget of this family ({', '.join(known)}); name it with --budget"
            raise ProblemsError([Problem("--budget", words)])
        return {name: folder}
    base, holds = nested.parent / "children", HOLDS[format]
    if format != "nemo" and (nested.parent / format).is_dir():
        base = nested.parent / format
    names = [budget] if budget else [n for n in known if (base / n / holds).exists()]
    if not names:
        words = f"no children of format {format} at {base}; run `nemo-elastic extract {nested} --all --format {format}`"
        words += ", or name a child's folder"
        raise ProblemsError([Problem("CHILD", words)])
    return {name: base / name for name in names}
