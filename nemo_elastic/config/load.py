"""YAML plus dotted overrides -> `RunConfig`, with the origin of every value; every problem in one error.

A file may name files it builds on: `base: [elastic/nano.yaml, ...]` (relative to itself, else of the shipped `conf/`),
later ones win, then the file's own keys, then the command line. What the model is, the parent's own files say (where
they do): the `model` section need not, and may not say otherwise.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..cost.conditions import inlined_profile
from ..problems import Problem, ProblemsError, did_you_mean, raise_if_any
from ..space.dims import WIDTH_DIMS
from .model_fields import model_problems
from .parent_files import parent_files, with_parents_words
from .recipe import with_recipe
from .sections import RunConfig
from .typed import build

_UNSETTABLE = (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, IndexError, RecursionError)
PATHS = frozenset(
    (
        "parent.path", "data.paths", "data.blend.path", "data.tokenizer", "data.cache_dir", "distill.teacher_cache",
        "train.start_from",
        "report.profile", "report.latency_table",
    )
)  # fmt: skip
NULLABLE = frozenset(("budgets", "subnets"))  # of `elastic`: names that a file gives, which another may leave out
CONF_DIRECTORY = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class Resolved:
    """A checked configuration, its plain values, and where each leaf came from."""

    config: RunConfig
    values: dict[str, Any]
    origins: dict[str, str]


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None
) -> Resolved:
    """Read, merge, check.

    Args:
        path: a YAML file, also one of the shipped `conf/` by its name; None: defaults only.
        overrides: `dotted.key=value` words, values in YAML.
        base: plain values to start from (those a checkpoint was made with): the parent's files are not asked again.

    Raises:
        ProblemsError: unreadable files, unknown keys (with a suggestion), wrong types and broken rules, all at once.
    """
    origins: dict[str, str] = {}
    merged = OmegaConf.create(dict(base or {}))
    if path is not None:
        merged = _read(_find(path), origins, ())
    merged = _override(merged, overrides, origins)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ProblemsError([Problem(str(path), f"cannot be resolved: {_first_line(error)}")]) from error
    problems: list[Problem] = []
    values = _without_nulls(_with_profile(_at_home(values), problems), origins)
    if base is None:
        values = _with_parent(values, origins, problems)
    config = build(RunConfig, values, "", problems)
    if not problems or values.get("model"):
        problems += model_problems(values.get("model") or {})
    from .rules import rule_problems

    if not problems:
        problems += rule_problems(config)
    raise_if_any(problems)
    config = with_recipe(config, values, origins)
    raise_if_any(rule_problems(config))
    return Resolved(config, plain(config), origins)


def _at_home(values: Any, key: str = "") -> Any:
    """`~` at the beginning of a path is the user's folder, as in a shell, which does not see it behind `key=`."""
    if isinstance(values, Mapping):
        return {name: _at_home(value, f"{key}.{name}" if key else str(name)) for name, value in values.items()}
    if isinstance(values, list):
        return [_at_home(value, key) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and key in PATHS else values


def _without_nulls(values: dict[str, Any], origins: dict[str, str]) -> dict[str, Any]:
    """Budgets and subnets that are null are none: so a file, or the command line, leaves out what it builds on has."""
    elastic = values.get("elastic")
    if not isinstance(elastic, Mapping):
        return values
    kept = dict(elastic)
    for name in NULLABLE & elastic.keys():
        if isinstance(elastic[name], Mapping):
            gone = [key for key, value in elastic[name].items() if value is None]
            kept[name] = {key: value for key, value in elastic[name].items() if key not in gone}
            for key in gone:
                origins.pop(f"elastic.{name}.{key}", None)
    return {**values, "elastic": kept}


def _with_profile(values: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """`report.profile: file.yaml` becomes what the file says, so that what is written down explains itself."""
    report = values.get("report")
    if not isinstance(report, Mapping) or "profile" not in report:
        return values
    try:
        return {**values, "report": {**report, "profile": inlined_profile(report["profile"])}}
    except ProblemsError as error:
        problems += error.problems
        return values


def _with_parent(values: dict[str, Any], origins: dict[str, str], problems: list[Problem]) -> dict[str, Any]:
    """The `model` section as the parent's own files say it, with what the configuration adds."""
    parent, given = values.get("parent"), values.get("model") or {}
    path = parent.get("path") if isinstance(parent, Mapping) else None
    if not isinstance(path, str) or not isinstance(given, Mapping):
        return values
    try:
        said = parent_files(path)
    except ProblemsError as error:
        problems += error.problems
        return values
    if said is None:
        if not given:
            problems.append(Problem("parent.path", f"nothing at {path!r} describes a model, and model is missing"))
        return values
    model, found = with_parents_words(given, said, parent.get("output_weights"))
    problems += found
    origins |= {f"model.{n}": str(said.file) for n, value in model.items() if given.get(n) != value}
    elastic = values.get("elastic") or {}
    if isinstance(elastic, Mapping) and elastic.get("depth_unit") is None and said.depth_unit != "layer":
        values = {**values, "elastic": {**elastic, "depth_unit": said.depth_unit}}
        origins["elastic.depth_unit"] = str(said.file)
    return {**values, "model": model}


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON-ready dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and any(isinstance(v, Mapping) for v in values):
        for i, value in enumerate(values):
            yield from leaves(value, f"{prefix}.{i}")
    else:
        yield prefix, values


def _find(path: str | Path) -> Path:
    given = Path(path)
    shipped_too = str(path) == given.name  # a path that is not there is never another file of the same name
    for candidate in (given, CONF_DIRECTORY / given) if shipped_too else (given,):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.name for p in CONF_DIRECTORY.glob("*.yaml"))
    raise ProblemsError([Problem("--config", f"no file {str(path)!r}{did_you_mean(given.name, shipped)}")])


def _read(path: Path, origins: dict[str, str], chain: tuple[Path, ...]) -> Any:
    if path in chain:
        raise ProblemsError([Problem("base", f"{path} builds on itself: {' -> '.join(map(str, (*chain, path)))}")])
    try:
        own = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ProblemsError([Problem(str(path), f"cannot be read as YAML: {_first_line(error)}")]) from error
    if not OmegaConf.is_dict(own):
        raise ProblemsError([Problem(str(path), "must be a mapping of sections (model:, elastic:, train:, ...)")])
    bases = own.pop("base", None) or []
    if not (isinstance(bases, str | list) or OmegaConf.is_list(bases)):
        raise ProblemsError([Problem(f"{path}: base", f"{bases!r} is neither a file nor a list of files")])
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else list(bases):
        places = (path.parent / str(base), CONF_DIRECTORY / str(base))
        target = next((place for place in places if place.is_file()), None)
        if target is None:
            raise ProblemsError([Problem(f"{path}: base", f"no file {str(base)!r} beside it or in the shipped conf/")])
        merged = _merge(merged, _read(target, origins, (*chain, path)), path)
    try:
        said = [key for key, _ in leaves(OmegaConf.to_container(own))]
        # A list takes the place of the one below, whose items are gone, whatever they said.
        _forget(origins, {match[0] for key in said if (match := re.match(r".*?\.(?=\d+\.)", key))})
        origins |= dict.fromkeys(said, str(path))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ProblemsError([Problem(str(path), f"cannot be read: {_first_line(error)}")]) from error
    return _merge(merged, own, path)


def _merge(below: Any, above: Any, where: Any) -> Any:
    try:
        return OmegaConf.merge(below, above)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ProblemsError([Problem(str(where), f"does not fit what it builds on: {_first_line(error)}")]) from error


def _override(merged: Any, overrides: Sequence[str], origins: dict[str, str]) -> Any:
    problems = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(word, "is no override; write dotted.key=value (values in YAML)"))
            continue
        try:
            value = OmegaConf.create(f"v: {text}" if text.strip() else "v: null")
            OmegaConf.update(merged, key, value.v, force_add=True, merge=True)
        except _UNSETTABLE as error:
            problems.append(Problem(key, f"{word!r} cannot be set: {_first_line(error)}"))
            continue
        if OmegaConf.is_list(value.v):
            _forget(origins, {f"{key}."})
        origins[key] = "command line"
    raise_if_any(problems)
    return merged


def _forget(origins: dict[str, str], below: Iterable[str]) -> None:
    for key in [key for key in origins if key.startswith(tuple(below))]:
        del origins[key]


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it refers to itself, or is nested too deep"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_values(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of plain values that `Resolved.values` or a manifest hold, checked again.

    Values written before there was `elastic.multiple_of` keep the sizes that their ratios had then.

    Raises:
        ProblemsError: as `load_config`.
    """
    problems: list[Problem] = []
    elastic = values.get("elastic")
    if isinstance(elastic, Mapping) and "multiple_of" not in elastic:
        values = {**values, "elastic": {**elastic, "multiple_of": dict.fromkeys(WIDTH_DIMS, 1)}}
    config = build(RunConfig, values, "", problems)
    raise_if_any([*problems, *model_problems(values.get("model") or {})])
    return config
