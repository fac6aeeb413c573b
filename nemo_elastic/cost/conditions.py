"""The conditions under which memory and latency are counted: batch, length, bytes per element, a measured table.

They come from the `report` section. `report.profile` is the name of a profile, a mapping, or a YAML file with one:

    {name: mine, weights: 1, kv_cache: 2, state: 4}         bytes per element; fractions for block formats

No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ..files import read_yaml
from ..problems import Problem, ProblemsError, did_you_mean
from ..space.architecture import Architecture
from .counts import BYTE_PROFILES, ByteProfile
from .latency import LatencyTable

KEY, TABLE_KEY = "report.profile", "report.latency_table"
SIZES = tuple(f.name for f in fields(ByteProfile))


class ReportSection(Protocol):
    """What the `report` section of a configuration says of the conditions."""

    @property
    def batch_size(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def profile(self) -> Any: ...
    @property
    def latency_table(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Resolved conditions. `profile_name` is what people read."""

    batch_size: int
    sequence_length: int
    profile: ByteProfile
    profile_name: str
    latency: LatencyTable | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """What `BudgetCost` and `Planner` take."""
        return {**self.memory_conditions, "latency": self.latency}

    @property
    def memory_conditions(self) -> dict[str, Any]:
        """What `cost.memory` takes."""
        return {"batch_size": self.batch_size, "sequence_length": self.sequence_length, "profile": self.profile}


def serving_of(report: ReportSection, architecture: Architecture | None = None) -> Serving:
    """The conditions a `report` section describes.

    Args:
        architecture: the parent; a latency table of another parent is refused.

    Raises:
        ProblemsError: an unknown profile, or a table that is missing, damaged or of another parent.
    """
    return Serving(
        batch_size=report.batch_size,
        sequence_length=report.sequence_length,
        profile=byte_profile(report.profile),
        profile_name=profile_name(report.profile),
        latency=read_table(report.latency_table, architecture),
    )


def read_table(path: str | None, architecture: Architecture | None = None) -> LatencyTable | None:
    """`report.latency_table`; None when none is named.

    Raises:
        ProblemsError: keyed `report.latency_table`.
    """
    if path is None:
        return None
    try:
        table = LatencyTable.read(path)
        if architecture is not None:
            table.check_parent(architecture)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        words = f"{path!r} is no latency table ({reason}); make one with `nemo-elastic profile`"
        raise ProblemsError([Problem(TABLE_KEY, words)]) from error
    return table


def byte_profile(profile: Any) -> ByteProfile:
    """The profile that a name or a mapping means (a file has become a mapping by then: `inlined_profile`).

    Raises:
        ProblemsError: with every missing, unknown or negative size.
    """
    if isinstance(profile, str):
        if profile not in BYTE_PROFILES:
            words = f"{profile!r} must be one of {', '.join(BYTE_PROFILES)}, a mapping, or a .yaml file with one"
            raise ProblemsError([Problem(KEY, words + (did_you_mean(profile, BYTE_PROFILES) if profile else ""))])
        return BYTE_PROFILES[profile]
    if not isinstance(profile, Mapping):
        raise ProblemsError([Problem(KEY, f"{profile!r} must be a name or a mapping of {', '.join(SIZES)}")])
    found = [Problem(f"{KEY}.{name}", "is missing: bytes per element") for name in SIZES if name not in profile]
    for name, value in profile.items():
        if name == "name":
            continue
        if name not in SIZES:
            found.append(Problem(f"{KEY}.{name}", f"unknown key{did_you_mean(str(name), (*SIZES, 'name'))}"))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            found.append(Problem(f"{KEY}.{name}", f"{value!r} must be a number of bytes per element"))
    if found:
        raise ProblemsError(found)
    return ByteProfile(**{name: profile[name] for name in SIZES})


def profile_name(profile: Any) -> str:
    """For tables."""
    return profile if isinstance(profile, str) else str(profile.get("name", "own profile"))


def inlined_profile(profile: Any) -> Any:
    """A profile file's content, so that the resolved configuration explains itself; anything else as it is.

    Raises:
        ProblemsError: no such file, or not YAML.
    """
    if not isinstance(profile, str) or not profile.endswith((".yaml", ".yml", ".json")):
        return profile
    try:
        content = read_yaml(Path(profile))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ProblemsError([Problem(KEY, f"{profile!r} cannot be read: {reason}")]) from error
    if not isinstance(content, Mapping):
        words = f"{profile!r} must hold a mapping of {', '.join(SIZES)}"
        raise ProblemsError([Problem(KEY, words)])
    return {"name": Path(profile).stem, **content}
