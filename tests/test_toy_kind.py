"""A layer kind that is not in the package gets everything from one file of facts and one module (`toy_linear*.py`).

One process that registers the kind walks the way from `plan` to a verified family (`toy_kind_walk.py`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_linear import LINEAR, RANK

from nemo_elastic.kinds import kinds

TESTS = Path(__file__).resolve().parent
PLACES = [1, 4, 7]  # of its letter in the pattern


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "toy_kind_walk.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())


def test_it_is_of_that_process_alone():
    assert LINEAR not in kinds()


def test_it_is_planned(walk):
    plan = walk[1]["plan"]
    assert (plan["code"], plan["problems"]) == (0, [])
    full, small, thin = plan["budgets"]
    assert full["subnet"][RANK] == 32 > small["subnet"][RANK] > thin["subnet"][RANK] == 8
    assert plan["parent"]["parameters_by_kind"]["linear"] == len(PLACES) * (48 + 2 * 32 * 48)
    assert thin["parameters_by_kind"]["linear"] % (40 + 2 * 8 * 40) == 0  # of the layers that it keeps
    assert abs(small["error"]) <= 0.02
    assert any(f"ranks 24 ({RANK} 24), 8 ({RANK} 8)" in note for note in plan["notes"])


def test_its_parameters_are_counted_as_they_are_built(walk):
    counted = walk[1]["counted"]
    assert len(counted) == 3
    assert [said for said, built in counted] == [built for said, built in counted]


def test_masked_soft_sliced_and_extracted_are_one_function(walk):
    found = walk[1]["modes"]
    assert set(found) == {"masked", "soft", "child"}
    assert max(found.values()) < 1e-12, found
    assert walk[1]["ranks"][0] == [8, 16, 32]  # the first layer by layer
    assert len({tuple(ranks) for ranks in walk[1]["ranks"]}) == 3


def test_megatron_is_given_its_own_letters_and_builds_ours_in_their_slot(walk):
    found = walk[1]
    assert (found["pattern"], found["mamba_slot"]) == ("M--*-M--", "mamba")
    of_stage = {key: "linear" if key in ("0.2", "1.1", "1.4") else "mlp" for key in found["slots"]}
    assert found["slots"] == of_stage  # layers 1, 4 and 7 of 8, on two stages


def test_sorting_leaves_the_function_alone(walk):
    assert walk[1]["moved"] > 10
    assert walk[1]["sorted"] < 1e-12


def test_its_units_are_ranked_by_what_its_module_says(walk):
    scores, formula = walk[1]["scores"], walk[1]["formula"]
    assert list(scores) == sorted(formula) == [str(n) for n in PLACES]
    for layer, row in scores.items():
        assert row == pytest.approx(formula[layer], rel=1e-6)
        assert len(set(row)) == 32


def test_a_family_is_trained_extracted_and_verified(walk):
    result = walk[1]["run"]
    assert (result["code"], result["verified"]) == (0, True)
    for budget in result["budgets"]:
        assert budget["check"]["numel"] == budget["parameters"]
        assert abs(budget["heldout_nested"] - budget["heldout_child"]) < 1e-5
    assert {b["name"]: b["verified"] for b in result["budgets"]} == {"full": True, "small": True, "thin": True}
    assert result["budgets"][2]["subnet"][RANK] == 8


def test_its_scores_are_in_the_file_of_the_run(walk):
    from safetensors.numpy import load_file

    tensors = load_file(walk[0] / "run" / "importance" / "importance.safetensors")
    assert {name for name in tensors if name.startswith(RANK)} == {f"{RANK}.{n}" for n in PLACES}


def test_it_has_a_colour_and_a_name_in_the_report(walk):
    page = Path(walk[1]["run"]["report"]).read_text()
    assert LINEAR.words in page
    assert LINEAR.colours[0] in page
    assert LINEAR.dims[0].words in page


def test_what_cannot_say_it_refuses_it(walk):
    assert walk[1]["refused"]["code"] == 2
    assert "'L' (low-rank linear) cannot be said in Hugging Face's NemotronH" in walk[1]["refused"]["errors"]
