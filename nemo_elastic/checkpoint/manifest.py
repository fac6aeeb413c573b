"""`elastic/manifest.json`: what a nested checkpoint is. Schema versioned, validated on load, no torch.

It names the parent's model section, the elastic space (choices, groups, depth ranking), one `Subnet` per budget, how
the run was made, and the SHA-256 and size of every file beside it. Permutations (old unit at each new place, per dim
and layer) are integers by the million for a large parent, so they lie in `elastic/permutations.safetensors`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.model_fields import architecture_of, model_problems
from ..cost.counts import parameters
from ..files import read_json
from ..problems import Problem, ProblemsError, did_you_mean, raise_if_any
from ..space.budget import Budget, name_problems
from ..space.dims import DEPTH, present_dims
from ..space.elastic_space import ElasticSpace
from ..space.layout import ParamLayout
from ..space.subnet import Subnet

FORMAT = "nemo_elastic.nested"
VERSION = 1
EXPERT_GROUPS = 2  # as 1, and `space.expert_groups`, where experts have other groups than neurons
FOLDER = "elastic"
MANIFEST_FILE = "elastic/manifest.json"
PERMUTATIONS_FILE = "elastic/permutations.safetensors"
ROUTER_FILE = "elastic/router.safetensors"
REQUIRED = ("format", "version", "model", "space", "budgets", "subnets", "files")
MAPPINGS = ("parameters", "rankings", "provenance")
_KEYS = (*REQUIRED, *MAPPINGS)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A nested family.

    Args:
        model: the parent's `model` section (`SSMConfig` field names; `vocab_size` is the rows of the embedding).
        space: every legal subnet; its `depth_ranking` is the measured one.
        budgets, subnets: by budget name; `subnets[name]` is the child that `extract --budget name` reads out.
        rankings: what else `rank` found and how (free form, JSON).
        provenance: how the run was made: seeds, versions, data, steps (free form, JSON).
        files: path inside the checkpoint -> {sha256, bytes}; filled by `write_manifest`.
    """

    model: Mapping[str, Any]
    space: ElasticSpace
    budgets: Mapping[str, Budget]
    subnets: Mapping[str, Subnet]
    rankings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def layout(self) -> ParamLayout:
        """The table of the nested weights."""
        return ParamLayout(self.space.architecture, ffn_groups=self.space.groups)

    def subnet(self, budget: str) -> Subnet:
        """The child of a budget.

        Raises:
            ProblemsError: no such budget; the message lists those there are.
        """
        if budget not in self.subnets:
            raise ProblemsError(
                [Problem("--budget", f"{budget!r} is not in this family{did_you_mean(budget, self.subnets)}")]
            )
        return self.subnets[budget]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        space = self.space
        one = space.groups.experts == space.groups.ffn
        return {
            "format": FORMAT,
            "version": VERSION if one else EXPERT_GROUPS,
            "model": dict(self.model),
            "space": {
                "ffn_groups": space.ffn_groups,
                **({} if one else {"expert_groups": space.groups.experts}),
                "depth_unit": space.depth_unit,
                "depth_ranking": None if space.depth_ranking is None else list(space.depth_ranking),
                "dims": {
                    name: {"choices": list(dim.choices), "per_layer": dim.per_layer}
                    for name, dim in space.dims.items()
                    if name in (*present_dims(space.architecture), DEPTH)
                },
            },
            "budgets": {name: {"kind": b.kind, "value": b.value} for name, b in self.budgets.items()},
            "subnets": {name: subnet.to_dict() for name, subnet in self.subnets.items()},
            "parameters": {name: parameters(self.layout, subnet) for name, subnet in self.subnets.items()},
            "rankings": dict(self.rankings),
            "provenance": dict(self.provenance),
            "files": {name: dict(entry) for name, entry in self.files.items()},
        }


def manifest_from_dict(data: Any) -> Manifest:
    """Inverse of `Manifest.to_dict`, every rule checked.

    Raises:
        ProblemsError: wrong format or version, missing or unknown keys, or values that no family can have.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ProblemsError([Problem("format", f"must be {FORMAT!r}: this is not the manifest of a nested checkpoint")])
    version = data.get("version")
    if version not in (VERSION, EXPERT_GROUPS):
        newer = isinstance(version, int) and version > EXPERT_GROUPS
        remedy = "install a newer nemo-elastic" if newer else "write it again"
        words = f"{version!r} cannot be read here, {VERSION} and {EXPERT_GROUPS} can; {remedy}"
        raise ProblemsError([Problem("version", words)])
    found = [Problem(key, "is missing") for key in REQUIRED if key not in data]
    found += [Problem(str(k), f"is no key of a manifest{did_you_mean(str(k), _KEYS)}") for k in data if k not in _KEYS]
    found += [Problem(k, "must be a mapping") for k in MAPPINGS if not isinstance(data.get(k, {}), Mapping)]
    raise_if_any(found)
    if not isinstance(data.get("provenance", {}).get("config", {}), Mapping | None):
        raise ProblemsError([Problem("provenance.config", "must be a mapping: the configuration of the run")])
    raise_if_any(model_problems(data["model"]))
    try:
        space = _space(data["model"], data["space"])
        budgets = {name: Budget(name=name, **b) for name, b in data["budgets"].items()}
        subnets = {name: space.subnet_from_dict(s) for name, s in data["subnets"].items()}
        files = {str(name): {"sha256": str(f["sha256"]), "bytes": int(f["bytes"])} for name, f in data["files"].items()}
    except ProblemsError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProblemsError([Problem("manifest", f"is damaged ({error!r}); write it again with `nest`")]) from error
    lost = sorted(set(budgets) - set(subnets))
    found = [Problem(f"subnets.{name}", "is missing for this budget") for name in lost]
    found += [Problem(f"files.{name}", "leaves the checkpoint's folder") for name in files if not _is_inside(name)]
    found += [problem for name in subnets for problem in name_problems(name, "subnets")]
    raise_if_any(found)
    manifest = Manifest(
        model=dict(data["model"]),
        space=space,
        budgets=budgets,
        subnets=subnets,
        rankings=dict(data.get("rankings", {})),
        provenance=dict(data.get("provenance", {})),
        files=files,
    )
    for name, count in data.get("parameters", {}).items():
        if name in subnets and parameters(manifest.layout, subnets[name]) != count:
            real = parameters(manifest.layout, subnets[name])
            raise ProblemsError([Problem(f"parameters.{name}", f"{count} is not what its subnet has, {real}")])
    return manifest


def _space(model: Mapping[str, Any], space: Mapping[str, Any]) -> ElasticSpace:
    bare = ElasticSpace(
        architecture=architecture_of(model),
        ffn_groups=space["ffn_groups"],
        expert_groups=space.get("expert_groups"),
        depth_unit=space.get("depth_unit", 1),
    )
    ranking = space["depth_ranking"]
    unknown = sorted(set(space["dims"]) - set(bare.dims))
    raise_if_any(Problem(f"space.dims.{n}", f"is no elastic dim{did_you_mean(n, bare.dims)}") for n in unknown)
    dims = {
        name: replace(bare.dims[name], choices=tuple(d["choices"]), per_layer=d["per_layer"])
        for name, d in space["dims"].items()
    }
    return replace(bare, dims=dims, depth_ranking=None if ranking is None else tuple(ranking))


def load_manifest(nested: str | os.PathLike[str]) -> Manifest:
    """The manifest of a nested checkpoint; every file it lists is there and has its size (hashes: `check_hashes`).

    Raises:
        ProblemsError: keyed by the file or the manifest's key.
    """
    nested = Path(nested)
    path = nested / MANIFEST_FILE
    if not path.is_file():
        words = f"has no {MANIFEST_FILE}: not a nested checkpoint; `train` and `nest` write one"
        raise ProblemsError([Problem(str(nested), words)])
    try:
        data = read_json(path)
    except ValueError as error:
        raise ProblemsError([Problem(str(path), f"is not JSON ({error}); write it again with `nest`")]) from error
    try:
        manifest = manifest_from_dict(data)
    except ProblemsError as error:
        raise ProblemsError([Problem(f"{path}: {p.key}", p.message) for p in error.problems]) from error
    found = []
    for name, entry in manifest.files.items():
        file = nested / name
        if not file.is_file():
            found.append(Problem(str(file), "is missing; copy the nested checkpoint again, whole"))
        elif file.stat().st_size != entry["bytes"]:
            words = (
                f"has {file.stat().st_size} bytes, its manifest says {entry['bytes']}: truncated or of another parent"
            )
            found.append(Problem(str(file), f"{words}; copy the nested checkpoint again"))
    raise_if_any(found)
    return manifest


class HashMismatch(ProblemsError):
    """Files that are not those that the manifest describes."""


def check_hashes(nested: str | os.PathLike[str], manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Hash every listed file (or those of `names`).

    Raises:
        HashMismatch: naming each file whose SHA-256 is not the manifest's.
    """
    found = []
    for name in manifest.files if names is None else names:
        real = file_sha256(Path(nested) / name)
        if real != manifest.files[name]["sha256"]:
            words = f"has SHA-256 {real[:12]}..., its manifest says {manifest.files[name]['sha256'][:12]}...: damaged"
            found.append(Problem(str(Path(nested) / name), f"{words}, or of another parent; copy it again"))
    if found:
        raise HashMismatch(found)


def write_manifest(nested: Path, manifest: Manifest, hashes: Mapping[str, str] | None = None) -> Manifest:
    """Write `manifest` with the hash and size of every file below `nested`; call it last.

    Args:
        hashes: path inside the checkpoint -> SHA-256, of files hashed while they were written.
    """
    files = {}
    for path in sorted(p for p in nested.rglob("*") if p.is_file()):
        name = path.relative_to(nested).as_posix()
        if name != MANIFEST_FILE:
            known = (hashes or {}).get(name)
            files[name] = {"sha256": known or file_sha256(path), "bytes": path.stat().st_size}
    complete = replace(manifest, files=files)
    (nested / FOLDER).mkdir(exist_ok=True)
    (nested / MANIFEST_FILE).write_text(json.dumps(complete.to_dict(), indent=1) + "\n")
    return complete


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
