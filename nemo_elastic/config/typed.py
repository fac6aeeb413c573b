"""Plain values -> the frozen dataclasses of `sections`: unknown keys, missing keys and wrong types, all of them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..problems import Problem, did_you_mean


def build(kind: type, values: Any, key: str, problems: list[Problem]) -> Any:
    """`kind` from a mapping; problems are collected and None is returned where nothing can be built."""
    if not isinstance(values, Mapping):
        problems.append(Problem(key or "config", f"{values!r} must be a mapping"))
        return None
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            dotted = f"{key}.{name}" if key else str(name)
            problems.append(Problem(dotted, f"unknown key{did_you_mean(str(name), hints)}"))
    before, built = len(problems), {}
    for name, hint in hints.items():
        if name in values:
            built[name] = _convert(hint, values[name], f"{key}.{name}" if key else name, problems)
    missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in values]
    problems += [Problem(f"{key}.{name}" if key else name, "is required") for name in missing]
    return kind(**built) if len(problems) == before and not missing else None


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, {} if value is None else value, key, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(Problem(key, f"{value!r} must be a list"))
            return ()
        return tuple(_convert(args[0], v, f"{key}.{i}", problems) for i, v in enumerate(value))
    if origin is not None and issubclass_safe(origin, Mapping):
        if not isinstance(value, Mapping):
            problems.append(Problem(key, f"{value!r} must be a mapping"))
            return {}
        return {str(k): _convert(args[1], v, f"{key}.{k}", problems) for k, v in value.items()}
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        return (
            _convert(inner[0], value, key, problems) if len(inner) == 1 else _scalar(tuple(inner), value, key, problems)
        )
    return value if hint is Any else _scalar((hint,), value, key, problems)


def issubclass_safe(kind: Any, of: type) -> bool:
    """`issubclass` that is False for what is no class."""
    return isinstance(kind, type) and issubclass(kind, of)


def _scalar(kinds: tuple[type, ...], value: Any, key: str, problems: list[Problem]) -> Any:
    if isinstance(value, bool) is (bool in kinds) and isinstance(value, kinds):
        return value
    if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
        return int(value)  # 45.0e+9 tokens
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if float in kinds and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kinds == (str,) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    words = " or ".join(
        {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a word"}[k.__name__] for k in kinds
    )
    problems.append(Problem(key, f"{value!r} must be {words}"))
    return value
