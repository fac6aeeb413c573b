"""A step with the teacher's states from disk is the step with the teacher, in every layout that fills or reads them."""

import json
from pathlib import Path

import numpy as np
import pool_family
import pytest
import torch
from test_family_parallel import LAYOUTS, SIZES, assert_close

from nemo_elastic.config.sections import StageConfig
from nemo_elastic.mcore.family.teacher_cache import TeacherCache
from nemo_elastic.problems import ProblemsError

STEPS = {"steps": (0, 3), "dtype": torch.float32, "distill": {"hidden_weight": 0.5, "budgets_per_batch": 2}}


def assert_same_steps(ranks: list, expected: dict) -> None:
    for rank in ranks:
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
            for name, gradient in ours["gradients"].items():
                assert_close(gradient, theirs["gradients"][name], name, 5e-5)  # fp32


def test_one_process_fills_what_every_layout_reads(
    one_rank: None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    expected = pool_family.train_steps(**STEPS)
    folder = tmp_path / "states"
    assert_same_steps([pool_family.train_steps(**STEPS, cache=str(folder))], expected)
    assert sorted(p.name for p in folder.iterdir()) == ["stage-0.npy", "teacher.json"]
    written = (folder / "stage-0.npy").stat().st_mtime_ns
    for name in ("pp2", "tp2_sp", "cp2"):
        ranks = request.getfixturevalue("pool2").run(
            pool_family.train_steps, **LAYOUTS[name], **STEPS, cache=str(folder)
        )
        assert_same_steps(ranks, expected)
    assert (folder / "stage-0.npy").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["dp2", "pp2", "tp2_sp", "cp2"])
def test_what_a_layout_fills_is_what_one_process_fills(
    one_rank: None, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    pool_family.train_steps(**STEPS, cache=str(tmp_path / "one"))
    request.getfixturevalue(f"pool{SIZES[name]}").run(
        pool_family.train_steps, **LAYOUTS[name], **STEPS, cache=str(tmp_path / "many")
    )
    one, many = (np.load(tmp_path / folder / "stage-0.npy") for folder in ("one", "many"))
    assert one.shape == (48, 16, 48) and np.abs(one).max(axis=(1, 2)).min() > 0.5  # every sample is written
    assert np.abs(one - many).max() < 1e-5 * np.abs(one).max()


def test_another_runs_states_are_refused(tmp_path: Path) -> None:
    def cache(**identity: str) -> TeacherCache:
        stages = (StageConfig(steps=1),)
        return TeacherCache(
            tmp_path, stages, micro_batch_size=4, hidden_size=8, dtype=torch.bfloat16, identity=identity
        )

    mine = cache(parent="a")
    assert not mine.is_whole and mine.nbytes == 8 * 256 * 8 * 2
    (tmp_path / "teacher.json").write_text(json.dumps(mine.identity))
    with pytest.raises(ProblemsError, match=r"stage-0\.npy is missing or cut short"):
        mine.is_whole  # noqa: B018
    np.save(tmp_path / "stage-0.npy", np.zeros((8, 256, 8), np.uint16))
    assert mine.is_whole
    with pytest.raises(ProblemsError, match=r"teacher_cache.*parent differ.*another folder"):
        cache(parent="b").is_whole  # noqa: B018
