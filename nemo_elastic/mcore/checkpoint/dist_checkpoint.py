"""Weights of a NeMo (torch_dist) checkpoint as whole canonical tensors, read one at a time without building a model.

Saved at any TP x PP: chunks are put together by the offsets in `.metadata`. Stock keys become the names of
`ParamLayout` (`module.` dropped, Transformer Engine's fused norm names resolved), and Mamba's parts are joined:

    in_proj.weight = [z; x; B; C; dt]      conv1d.{weight,bias} = [x; B; C]      (rows)

No pickle is executed: `.metadata` goes through `preflight`, tensors through `tensor_record`. Every file is
opened with the folder and read through that handle.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from nemo_elastic.checkpoint.held_files import HeldFolder
from nemo_elastic.kinds import kinds
from nemo_elastic.mcore.checkpoint.preflight import Chunk, RefusedPickle, StoredTensor, read_metadata
from nemo_elastic.mcore.checkpoint.tensor_record import read_record
from nemo_elastic.problems import Problem, ProblemsError

PARTS = {row: tuple(kind.rows[row][0].split("+")) for kind in kinds() for row in kind.stored_in_parts}
_UNFUSED = {fused: own for own, fused in (kind.norm for kind in kinds())}
_PREFIX = re.compile(r"^(module\.|model\.)*(?=embedding\.|decoder\.|output_layer\.)")
_LAYER = re.compile(r"^(decoder\.layers\.\d+\.)(.+)$")


def split_key(key: str) -> tuple[str, str | None] | None:
    """(canonical name, part or None) of a checkpoint key; None for what is no weight (optimizer, router, ...)."""
    prefix = _PREFIX.match(key)
    if prefix is None:
        return None
    name = key[prefix.end() :]
    layer = _LAYER.match(name)
    if layer is None:
        return name, None
    start, suffix = layer.groups()
    for whole, parts in PARTS.items():
        if suffix.startswith(f"{whole}.") and suffix[len(whole) + 1 :] in parts:
            return start + whole, suffix[len(whole) + 1 :]
    return start + _UNFUSED.get(suffix, suffix), None


def weights_folder(path: str | os.PathLike[str]) -> Path:
    """`path/weights` of a NeMo checkpoint, or `path` itself where it is a torch_dist folder."""
    path = Path(path)
    return path / "weights" if (path / "weights").is_dir() else path


class TorchDistReader:
    """`TensorReader` over the `weights/` of a NeMo checkpoint.

    Args:
        path: the checkpoint, or its `weights` folder.

    Raises:
        ProblemsError: no torch_dist checkpoint; a hostile or damaged `.metadata`; a file missing or too short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = weights_folder(path)
        self._held = HeldFolder(self.path)
        self._stored = read_metadata(self._held).tensors
        self._keys: dict[str, list[str]] = {}
        by_part: dict[str, dict[str | None, str]] = {}
        for key in self._stored:
            split = split_key(key)
            if split is not None:
                by_part.setdefault(split[0], {})[split[1]] = key
        for name, parts in by_part.items():
            order = PARTS.get(_suffix(name), ()) if None not in parts else (None,)
            lost = [p for p in order if p not in parts]
            if lost:
                raise self._problem(f"lacks part {lost[0]!r} of {name}: not a whole checkpoint; copy it again")
            self._keys[name] = [parts[p] for p in order]
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for stored in self._stored.values():
            for chunk in stored.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for file, end in ends.items():
            size = self._held.size(file)
            if size < end:
                words = f"has {size} bytes, {end} are described: truncated; copy it again"
                raise ProblemsError([Problem(str(self.path / file), words)])

    def names(self) -> list[str]:
        """Canonical names of all weights."""
        return list(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape."""
        first, *rest = (self._stored[key].shape for key in self._keys[name])
        return (first[0] + sum(shape[0] for shape in rest), *first[1:]) if first else ()

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self._stored[self._keys[name][0]].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from parts and chunks."""
        keys = self._keys[name]
        if len(keys) == 1:
            return self.read_key(keys[0])
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        row = 0
        for key in keys:
            rows = self._stored[key].shape[0]
            self.read_key(key, whole[row : row + rows])
            row += rows
        return whole

    def other_keys(self) -> list[str]:
        """Keys of tensors that are no weight of the model: optimizer state, router, ..."""
        return [key for key in self._stored if split_key(key) is None]

    def read_key(self, key: str, into: Tensor | None = None) -> Tensor:
        """One tensor by the checkpoint's own key, new or in place of `into`.

        Raises:
            ProblemsError: damaged bytes, or chunks that do not cover the tensor.
        """
        stored = self._stored[key]
        whole = torch.empty(stored.shape, dtype=stored.dtype) if into is None else into
        covered = 0
        for chunk in stored.chunks:
            window = whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))]
            part = self._read_chunk(key, stored, chunk, window)
            if part is not window:
                window.copy_(part)
            covered += part.numel()
        if covered != whole.numel():
            raise self._problem(f"has {covered} of the {whole.numel()} elements of {key}: chunks are missing")
        return whole

    def _read_chunk(self, key: str, stored: StoredTensor, chunk: Chunk, window: Tensor) -> Tensor:
        path = self.path / chunk.file
        try:
            tensor = read_record(self._held.open(chunk.file), chunk, path, window)
        except ProblemsError:
            raise
        except RefusedPickle as error:
            raise ProblemsError([Problem(f"{path} ({key})", f"{error}; nothing of it was executed")]) from error
        except Exception as error:  # a damaged record can raise nearly anything
            words = f"the record of {key} is damaged ({str(error)[:160]}); copy the checkpoint again"
            raise ProblemsError([Problem(str(path), words)]) from error
        if tensor.dtype != stored.dtype or tuple(tensor.shape) != chunk.sizes:
            real = f"{tensor.dtype} {list(tensor.shape)}"
            words = (
                f"the record of {key} holds {real}, .metadata says {stored.dtype} {list(chunk.sizes)}; copy it again"
            )
            raise ProblemsError([Problem(str(path), f"{words}; copy the checkpoint again")])
        return tensor

    def close(self) -> None:
        """Close the files (a later read opens them again)."""
        self._held.close()

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _problem(self, message: str) -> ProblemsError:
        return ProblemsError([Problem(str(self.path), message)])


def _suffix(name: str) -> str:
    match = _LAYER.match(name)
    return match.group(2) if match else name
