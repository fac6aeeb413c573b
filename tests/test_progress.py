"""`progress` of every verb that runs long: the same callable, told of the last part, and its exception ends the work.

Identity: (name, i, n) for i = 1 .. n, behind each tensor that `sort` and `nest` read.
"""

import inspect
from pathlib import Path

import pytest
import torch

from nemo_elastic.checkpoint.atomic_folder import atomic_folder
from nemo_elastic.checkpoint.reader import LazyTensor, told
from nemo_elastic.checkpoint.writer import write_safetensors


def tensors(count: int) -> list[LazyTensor]:
    return [LazyTensor(f"t{i}", torch.float32, (3,), lambda i=i: torch.full((3,), float(i))) for i in range(count)]


def test_tensors_tell_how_many_were_read(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    hashes = write_safetensors(tmp_path, told(tensors(5), lambda done, total: heard.append((done, total))))
    assert heard == [(i, 5) for i in range(1, 6)]
    (tmp_path / "plain").mkdir()
    assert hashes == write_safetensors(tmp_path / "plain", told(tensors(5), None))
    again = told(tensors(2), lambda done, total: heard.append((done, total)))
    for tensor in (again[0], again[0], again[1]):
        tensor.read()
    assert heard[5:] == [(1, 2), (1, 2), (2, 2)]  # a tensor that is read twice counts once


def test_an_exception_of_progress_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), atomic_folder(tmp_path / "out") as folder:
        write_safetensors(folder, told(tensors(5), stop))
    assert list(tmp_path.iterdir()) == []


def test_a_nested_checkpoint_tells_of_its_tensors(tmp_path: Path) -> None:
    pytest.importorskip("nemo.collections.llm")
    from checkpoint_family import TOKENIZER, manifest, random_weights

    from nemo_elastic.nemo.export.nested import write_nested

    heard: list[tuple[int, int]] = []
    weights = random_weights()
    write_nested(tmp_path / "nested", weights, manifest(), tokenizer=TOKENIZER, heard=lambda *told: heard.append(told))
    assert heard == [(i, len(weights)) for i in range(1, len(weights) + 1)]


def test_every_verb_that_runs_long_takes_it() -> None:
    from nemo_elastic.nemo import api, recipes

    long = {name for name in dir(recipes) if name in api.__all__} | {"nest", "plan", "verify_parent"}
    assert {"train", "rank", "sort", "profile", "extract", "verify", "quickstart"} <= long
    for name in sorted(long):
        assert "progress" in inspect.signature(getattr(api, name)).parameters, name
