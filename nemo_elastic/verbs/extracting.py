"""`extract`: which children, written how, and whether that makes sense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..config.load import load_config
from ..config.sections import ExportConfig
from ..problems import Problem, raise_if_any

CHOICES = {
    "format": ("nemo", "hf", "gguf"),
    "hf_schema": ("uniform", "list", "per_layer_config"),
    "dtype": ("bfloat16", "float32", "float16"),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Children of a nested checkpoint; named like the flags of `extract`. `hint`: what to add to a refused override."""

    budget: str | None = None
    all: bool = False
    subnet: str | None = None
    nested: bool = False
    format: str = "nemo"
    hf_schema: str | None = None
    dtype: str | None = None
    overrides: tuple[str, ...] = ()
    hint: str = ""

    def problems(self) -> Iterator[Problem]:
        """What does not go together."""
        for word in self.overrides:
            if not word.startswith("export."):
                yield Problem(word, f"cannot be set for a nested checkpoint, export.* can{self.hint}")
                return
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                yield Problem(f"--{name.replace('_', '-')}", f"{value!r} must be one of {', '.join(choices)}")
        if self.format != "hf" and self.hf_schema:
            yield Problem("--hf-schema", "says how a Hugging Face folder is written; add --format hf")
        elif self.nested and self.format != "hf":
            yield Problem("--nested", "writes a Hugging Face folder; add --format hf")
        elif self.nested and (self.budget or self.all):
            yield Problem("--nested", "holds every budget; leave --budget and --all out")
        elif not self.nested and sum(map(bool, (self.budget, self.all, self.subnet))) != 1:
            yield Problem("--budget", "give one budget by --budget NAME, or --all, or --subnet YAML")

    def export(self, manifest: Any) -> ExportConfig:
        """The run's `export` section, with what was given.

        Raises:
            ProblemsError: another word than the section knows, or a flag and an override that disagree.
        """
        stored = (manifest.provenance.get("config") or {}).get("export") or {}
        base = {"model": dict(manifest.model), "export": dict(stored)}
        given = {word.partition("=")[0] for word in self.overrides}
        export = load_config(None, self.overrides, base=base).config.export
        flags = {name: value for name in ("dtype", "hf_schema") if (value := getattr(self, name)) is not None}
        raise_if_any(
            Problem(
                f"export.{name}",
                f"{getattr(export, name)!r} and --{name.replace('_', '-')} {value}: give one of the two",
            )
            for name, value in flags.items()
            if f"export.{name}" in given and getattr(export, name) != value
        )
        return replace(export, **flags)
