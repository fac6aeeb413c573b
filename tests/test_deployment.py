"""Where a child may run: rules of METHOD section 1 and PLATFORM, on sizes whose answer is known by hand."""

import json

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.family import family_of
from nemo_elastic.plan.deployment import deployment, fp8_problems, hugging_face_note


def _tiny():
    family = family_of(load_config("tiny_parent.yaml").config)
    return family, family.layout


def test_parallel_sizes_are_divisors_of_groups_and_layers():
    family, layout = _tiny()
    found = deployment(layout, family.space.subnet(num_layers=15))
    assert found["tensor_parallel"] == [1, 2, 4]  # four Mamba groups, four KV groups
    assert found["pipeline_parallel"] == [1, 3, 5, 15]


def test_fp8_names_the_axis_that_does_not_fit():
    family, layout = _tiny()
    assert fp8_problems(layout, family.space.full_subnet(), "x") == []
    # 12 heads x 16: rows = 2 * 192 + 2 * 4 * 32 + 12 = 652, no multiple of 16
    (problem,) = fp8_problems(layout, family.space.subnet(mamba_num_heads=12), "elastic.budgets.small")
    assert problem.key == "elastic.budgets.small" and "= 652" in problem.message
    sizes = {"hidden_size": 120, "ffn_hidden_size": (512, 512, 512, 504, 512, 512, 512)}
    found = fp8_problems(layout, family.space.subnet(**sizes), "x")
    assert [p.message.split()[:2] for p in found] == [["hidden_size", "120"], ["ffn_hidden_size", "504"]]


def test_ragged_children_say_what_no_schema_can():
    family, _ = _tiny()
    arch = vars(family.architecture)
    assert hugging_face_note(arch, family.space.full_subnet()) == "loads as NemotronH"
    assert "padded" in hugging_face_note(arch, family.space.subnet(ffn_hidden_size=(512,) * 6 + (256,)))
    assert "no stock schema" in hugging_face_note(arch, family.space.subnet(mamba_num_heads=(16,) * 6 + (12,)))


def test_a_plan_for_fp8_training_reports_children_that_do_not_fit(capsys):
    words = [
        "plan",
        "--config",
        "tiny_parent.yaml",
        "--json",
        "model.fp8=hybrid",
        "elastic.subnets.small.mamba_num_heads=12",
    ]
    assert main(words) == 2
    plan = json.loads(capsys.readouterr().out)
    assert any(p["key"] == "elastic.budgets.small" and "652" in p["message"] for p in plan["problems"])
    assert any(p["key"] == "model.fp8" and "never entered under a plan" in p["message"] for p in plan["problems"])
