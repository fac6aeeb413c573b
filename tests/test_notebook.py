"""Python use as in a notebook: code that comes from no file, an event loop, a stdout without a descriptor, and one run
after another in the same process. Nothing of it needs a `__main__` guard.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
CODE = """
import asyncio, io, json, os, sys

async def cells():
    from nemo_elastic.nemo import api

    config, heard, found = "{folder}/run.yaml", [], {{}}
    alike = ["elastic.dims.mamba_num_heads.per_layer=false"]  # which a NeMo child can say
    def progress(name, done, total, text=""):
        heard.append((name, done, total))

    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")
    ranked = api.rank(config, "{folder}/by_steps", overrides=alike, progress=progress)
    found["layers"] = sorted(ranked.depth_ranking)
    found["sorted"] = api.sort(config, "{folder}/by_steps", overrides=alike, progress=progress).is_dir()
    first = api.train(config, "{folder}/by_steps", overrides=alike, progress=progress)
    found["environment"] = {{name: os.environ[name] for name in launcher if name in os.environ}}
    words = [*alike, "train.async_save=true", "data.num_workers=1"]
    second = api.train(config, "{folder}/at_once", overrides=words)
    found["losses"] = [first.heldout_losses, second.heldout_losses]
    third = api.train(config, "{folder}/at_once", overrides=alike, force=True)
    found["losses"].append(third.heldout_losses)
    extracted = api.extract(first.nested, progress=progress)
    found["children"] = {{name: (folder / "weights").is_dir() for name, folder in extracted.folders.items()}}
    checked = api.verify(first.nested, progress=progress)
    found["verified"] = [checked.ok, bool(checked), [check.budget for check in checked.checks]]
    found["pairs"] = [[pair.smaller, pair.larger, pair.nested] for pair in checked.pairs]
    said = api.generate(first.nested, "line 1 says", budget="small", max_new_tokens=4)
    found["tokens"] = len(said.tokens)
    how = dict(budget=0.7, output="{folder}/subnet.yaml", overrides=["router.tolerance=0.02"])
    between = api.plan(folder=first.nested, **how).budget("0.7")
    found["between"] = [between.origin, between.error]
    cut = api.extract(first.nested, "{folder}/cut", subnet="{folder}/subnet.yaml")
    found["cut"] = list(cut.folders)
    found["report"] = api.report("{folder}/by_steps").page.is_file()
    try:
        api.train(config, "{folder}/by_steps", overrides=alike)
    except api.ProblemsError as error:
        found["again"] = str(error)
    found["heard"] = sorted({{name for name, _, _ in heard}})
    found["ends"] = all((name, total, total) in heard for name, _, total in heard)
    return found

shown, sys.stdout = sys.stdout, io.StringIO()
shown.write(json.dumps(asyncio.run(cells())))
"""


def test_every_step_in_one_process_from_stdin(tmp_path: Path) -> None:
    write_run(tmp_path, steps=8)
    own = {n: v for n, v in os.environ.items() if not n.startswith("NVTE_")}
    done = subprocess.run(
        [sys.executable, "-"],
        input=CODE.format(folder=tmp_path),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["layers"] == list(range(8)) and found["sorted"]
    assert found["environment"] == {"RANK": "0", "WORLD_SIZE": "1"}  # of our own process group, nothing of Lightning's
    first, second, third = found["losses"]
    assert first == second == third and set(first) == {"full", "large", "small"}  # bit for bit
    assert found["children"] == dict.fromkeys(("full", "large", "small"), True)
    assert found["verified"] == [True, True, ["full", "large", "small"]]
    assert {(a, b) for a, b, _ in found["pairs"]} == {("small", "large"), ("small", "full"), ("large", "full")}
    assert found["tokens"] == 4 and found["cut"] == ["0.7"] and found["report"]
    assert found["between"][0].startswith(("between ", "trained as ")) and abs(found["between"][1]) <= 0.02
    assert "by_steps" in found["again"] and "--resume" in found["again"]
    assert (
        found["heard"] == ["extract", "nest", "rank layers", "rank widths", "sort", "train", "verify"] and found["ends"]
    )
