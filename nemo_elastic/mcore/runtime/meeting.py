"""What the processes of a run agree on before they have process groups, by the store that their launcher gave them.

    raise_together(shared, own)    `shared` looks once, on the first process; `own` on each; every one raises all of it

A file that appears between two ranks' looks would else let one of them go on and the other leave: those that went on
would wait until a collective gives up. Only torch is needed: what is refused is refused before Megatron is imported.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from ...problems import Problem, ProblemsError, raise_if_any

Look = Callable[[], Iterable[Problem]]
_calls = itertools.count()
_kept: dict[str, Any] = {}


def raise_together(shared: Look, own: Look, *, wait_minutes: float) -> None:
    """Raise the problems that `shared` finds on the first process and `own` on any; alone, those of both.

    Args:
        wait_minutes: how long the others wait for the first one, which may tokenize a text.

    Raises:
        ProblemsError: what was found anywhere, each problem once; the same on every process.
        ValueError: what a look raised here without a key, where nothing else was found.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found, plain = _looked([own, shared] if rank == 0 else [own], f"process {rank}")
    if world > 1:
        found = _union(found, rank, world, timedelta(minutes=wait_minutes))
    if plain is not None and len(found) == 1:
        raise plain
    raise_if_any(found)


def _looked(looks: Iterable[Look], name: str) -> tuple[list[Problem], ValueError | None]:
    found, plain = [], None
    for look in looks:
        try:
            found += look()
        except ProblemsError as error:
            found += error.problems
        except ValueError as error:
            plain = plain or error
            found.append(Problem(name, str(error)))
    return list(dict.fromkeys(found)), plain


def _union(found: list[Problem], rank: int, world: int, limit: timedelta) -> list[Problem]:
    store, call = _store(limit), f"nemo_elastic/{next(_calls)}"
    if rank:
        store.set(f"{call}/{rank}", _said(found))
    else:
        every = [*found, *(p for other in range(1, world) for p in _heard(store, f"{call}/{other}", limit))]
        store.set(f"{call}/all", _said(list(dict.fromkeys(every))))
    return _heard(store, f"{call}/all", limit)


def _store(limit: timedelta) -> Any:
    """The launcher's store, kept: its other users go on with it."""
    if "store" not in _kept:
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=limit))
        _kept["store"] = PrefixStore("start", store)
    return _kept["store"]


def _said(found: list[Problem]) -> str:
    return json.dumps([[p.key, p.message] for p in found])


def _heard(store: Any, key: str, limit: timedelta) -> list[Problem]:
    store.wait([key], limit)
    return [Problem(*pair) for pair in json.loads(store.get(key))]
