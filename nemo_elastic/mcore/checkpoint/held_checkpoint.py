"""A checkpoint that Megatron's own loader may read: every pickle of it checked, and what was checked handed on.

    loaded bytes == checked bytes

Stock loaders unpickle `.metadata` and byte objects without restriction, `common.pt` if an environment variable says so,
and let `metadata.json` and further files choose other loaders. Here the loader gets a private folder instead.
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from pathlib import Path

import torch

from nemo_elastic.checkpoint.held_files import HeldFolder
from nemo_elastic.files import parse_json
from nemo_elastic.mcore.checkpoint.preflight import (
    COMMON_FILE,
    CONFIG_FILE,
    METADATA_FILE,
    DistMetadata,
    parse_metadata,
    read_metadata,
)
from nemo_elastic.problems import Problem, raise_if_any


class HeldCheckpoint:
    """A torch_dist checkpoint that a stock loader may read: checked through handles, and handed on through the same.

    `path` is a private folder: copies of the small files as they were checked, and links to the open handles of the
    shards. What is exchanged afterwards is never read, and neither is anything else that lies in the folder (other
    formats, ModelOpt's state). Without `close` it goes when it is no longer referred to.

    Args:
        checkpoint: a NeMo checkpoint, or its `weights`.

    Raises:
        ProblemsError: naming each refused or damaged file or object; nothing of them was executed.
    """

    def __init__(self, checkpoint: str | os.PathLike[str]) -> None:
        weights = Path(checkpoint) / "weights" if (Path(checkpoint) / "weights").is_dir() else Path(checkpoint)
        self._held = HeldFolder(weights)
        small, shards = _checked(self._held)
        self._private = tempfile.TemporaryDirectory(prefix="nemo-elastic-held-")
        self.path = Path(self._private.name)
        (self.path / "weights").mkdir()
        for name, data in small.items():
            (self.path / "weights" / name).write_bytes(data)
        for name in shards:
            (self.path / "weights" / name).symlink_to(f"/proc/{os.getpid()}/fd/{self._held.open(name)}")

    def close(self) -> None:
        """Remove the private folder, close the files."""
        self._private.cleanup()
        self._held.close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def refuse_hostile(weights: str | os.PathLike[str]) -> DistMetadata:
    """Check every pickle of a torch_dist folder. To load it afterwards use `HeldCheckpoint`, which checks as well.

    `.metadata` by the allow-list, `common.pt` and each byte object with torch's weights-only unpickler.

    Raises:
        ProblemsError: naming each refused or damaged file or object; nothing of them was executed.
    """
    held = HeldFolder(Path(weights))
    try:
        small, _ = _checked(held)
    finally:
        held.close()
    return parse_metadata(small[METADATA_FILE], Path(weights) / METADATA_FILE)


def _checked(held: HeldFolder) -> tuple[dict[str, bytes], set[str]]:
    """(small file -> its bytes, names of shards) of a folder, each pickle of it checked."""
    read_metadata(held)  # says so where there is none
    small = {METADATA_FILE: held.read(METADATA_FILE)}
    metadata = parse_metadata(small[METADATA_FILE], held.folder / METADATA_FILE)  # the very bytes that are handed on
    found = []
    for name in (COMMON_FILE, CONFIG_FILE):
        if (held.folder / name).exists():
            small[name] = held.read(name)
    if COMMON_FILE in small:
        found += _weights_only_problems(small[COMMON_FILE], str(held.folder / COMMON_FILE))
    found += _config_problems(small.get(CONFIG_FILE), held.folder / CONFIG_FILE)
    for key, item in metadata.objects.items():
        data = held.read(item.file, item.start, item.length)
        found += _weights_only_problems(data, f"{held.folder / item.file} ({key})")
    raise_if_any(found)
    shards = {chunk.file for tensor in metadata.tensors.values() for chunk in tensor.chunks}
    return small, shards | {item.file for item in metadata.objects.values()}


def _config_problems(data: bytes | None, path: Path) -> list[Problem]:
    """`metadata.json` chooses the loader; only torch_dist has been checked."""
    if data is None:
        return [Problem(str(path), "is missing: not a Megatron checkpoint; copy it again")]
    try:
        said = parse_json(data)
        backends = said.get("sharded_backend"), said.get("common_backend", "torch")
    except (ValueError, AttributeError) as error:
        return [Problem(str(path), f"is damaged ({error}); copy the checkpoint again")]
    if backends != ("torch_dist", "torch"):
        return [Problem(str(path), f"asks for the loaders {backends}; only torch_dist is read, convert it first")]
    return []


def _weights_only_problems(data: bytes, what: str) -> list[Problem]:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:200]
        return [Problem(what, f"holds a pickle that is not plain data, refused and not executed ({reason})")]
    except Exception as error:  # a damaged archive can raise nearly anything
        return [Problem(what, f"is damaged ({type(error).__name__}: {str(error)[:120]}); copy the checkpoint again")]
    return []
