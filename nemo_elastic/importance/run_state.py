"""Where an interrupted ranking goes on: one small file per rank and step, the last two steps kept.

A step is one batch, so at most one is lost; ranks that were stopped at different moments agree on the latest step that
all of them have. A state fits one setting, parent, data and parallel layout: the fingerprint says which.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..problems import Problem, ProblemsError

KEPT = 2
WHERE = ".state"


class RunState:
    """States of one rank under `folder/.state`.

    Args:
        fingerprint: JSON-ready; whatever must be equal for a state to be of use.
    """

    def __init__(self, folder: str | Path, rank: int, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.rank = Path(folder) / WHERE, rank
        self.fingerprint = json.dumps(fingerprint, sort_keys=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Keep this rank's state after `step`, atomically, and forget all but the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".rank{self.rank}.{os.getpid()}"
        metadata = {"fingerprint": self.fingerprint, "values": json.dumps(values)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, self._path(step))
        for old in self.steps()[:-KEPT]:
            self._path(old).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps this rank has a state of, ascending."""
        found = (path.stem.split("-") for path in self.folder.glob(f"rank{self.rank}-*.safetensors"))
        return sorted(int(step) for _, step in found)

    def latest(self, gather: Callable[[list[int]], list[list[int]]]) -> int | None:
        """The latest step that every rank has; `gather` gives all ranks' lists."""
        common = set.intersection(*map(set, gather(self.steps())))
        return max(common, default=None)

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, values) of a step.

        Raises:
            ProblemsError: when the state is of other settings.
        """
        with safe_open(self._path(step), framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        if metadata["fingerprint"] != self.fingerprint:
            theirs, ours = json.loads(metadata["fingerprint"]), json.loads(self.fingerprint)
            changed = ", ".join(sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)))
            words = f"{self.folder} was saved with another {changed}; restore it, or rank without --resume"
            raise ProblemsError([Problem("--resume", words)])
        return tensors, json.loads(metadata["values"])

    def _path(self, step: int) -> Path:
        return self.folder / f"rank{self.rank}-{step}.safetensors"


def forget_states(folder: str | Path) -> None:
    """Remove all ranks' states under `folder`, when the scores themselves are written."""
    shutil.rmtree(Path(folder) / WHERE, ignore_errors=True)
