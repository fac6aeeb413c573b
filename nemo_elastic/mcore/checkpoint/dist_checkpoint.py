"""Weights of a NeMo (torch_dist) checkpoint as whole canonical tensors, read one at a time without building a model.

Saved at any TP x PP: chunks are put together by the offsets in `.metadata`. Stock keys become the names of
`ParamLayout` (`module.` dropped, Transformer Engine's fused norm names resolved), and Mamba's parts are joined:

    in_proj.weight = [z; x; B; C; dt]      conv1d.{weight,bias} = [x; B; C]      (rows)

So are experts that are stored one by one, gate and up perhaps apart (`stored_names`), into `[E, f, h]`.

No pickle is executed: `.metadata` goes through `preflight`, tensors through `tensor_record`. Every file is
opened with the folder and read through that handle.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from nemo_elastic.checkpoint.held_files import HeldFolder
from nemo_elastic.mcore.checkpoint.preflight import Chunk, RefusedPickle, StoredTensor, read_metadata
from nemo_elastic.mcore.checkpoint.stored_names import HALVES, PARTS, place_of, suffix_of
from nemo_elastic.mcore.checkpoint.tensor_record import read_record
from nemo_elastic.problems import Problem, ProblemsError


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
        self._units: dict[str, list[list[str]]] = {}  # of weights whose experts are stored one by one
        found: dict[str, dict[int | None, dict[str | None, str]]] = {}
        for key in self._stored:
            if (place := place_of(key)) is not None:
                found.setdefault(place.name, {}).setdefault(place.unit, {})[place.part] = key
        for name, units in found.items():
            if None in units:
                self._keys[name] = self._in_order(name, units[None])
                continue
            count = max(units) + 1
            if lost := [unit for unit in range(count) if unit not in units]:
                raise self._problem(f"lacks expert {lost[0]} of {name}: not a whole checkpoint; copy it again")
            self._units[name] = [self._in_order(name, units[unit]) for unit in range(count)]
            self._check_alike(name)
        self._check_files()

    def _in_order(self, name: str, parts: dict[str | None, str]) -> list[str]:
        """Keys of the parts of a weight, in the order of their rows."""
        if None in parts:
            return [parts[None]]
        order = PARTS.get(suffix_of(name), HALVES)
        if lost := [part for part in order if part not in parts]:
            raise self._problem(f"lacks part {lost[0]!r} of {name}: not a whole checkpoint; copy it again")
        return [parts[part] for part in order]

    def _check_alike(self, name: str) -> None:
        said = [[(self._stored[key].shape, self._stored[key].dtype) for key in keys] for keys in self._units[name]]
        if unlike := [unit for unit, one in enumerate(said) if one != said[0]]:
            raise self._problem(f"expert {unlike[0]} of {name} has another shape or dtype than the first one")

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
        return [*self._keys, *self._units]

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape."""
        units = self._units.get(name)
        first, *rest = (self._stored[key].shape for key in (units[0] if units else self._keys[name]))
        shape = (first[0] + sum(shape[0] for shape in rest), *first[1:]) if first else ()
        return (len(units), *shape) if units else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self._stored[self._units[name][0][0] if name in self._units else self._keys[name][0]].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from parts and chunks."""
        if name in self._units:
            whole = torch.empty(self.shape(name), dtype=self.dtype(name))
            for keys, unit in zip(self._units[name], whole, strict=True):
                self._read_rows(keys, unit)
            return whole
        keys = self._keys[name]
        if len(keys) == 1:
            return self.read_key(keys[0])
        return self._read_rows(keys, torch.empty(self.shape(name), dtype=self.dtype(name)))

    def _read_rows(self, keys: list[str], whole: Tensor) -> Tensor:
        row = 0
        for key in keys:
            rows = self._stored[key].shape[0]
            self.read_key(key, whole[row : row + rows])
            row += rows
        return whole

    def other_keys(self) -> list[str]:
        """Keys of tensors that are no weight of the model: optimizer state, router, ..."""
        return [key for key in self._stored if place_of(key) is None]

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
