"""Sizes that kernels like: what ratios round to, and which widths on a tensor-parallel rank `plan` names."""

import json

import pytest
import torch

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config, load_values
from nemo_elastic.family import family_of
from nemo_elastic.mcore.family import checks
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.alignment import alignment_notes, convolution_notes, rounding_step, unaligned_widths

NANO = "nemotron_nano_12b_v2.yaml"


def choices(config: str, *overrides: str) -> dict[str, tuple[int, ...]]:
    return {name: dim.choices for name, dim in family_of(load_config(config, overrides).config).space.dims.items()}


def test_plan_names_the_packed_widths_of_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    """16, 15, 14, 12 and 10 heads of 80 channels a rank, one group of 128 states: 161 heads + 256 rows."""
    assert main(["plan", "--config", NANO, "--json"]) == 0
    (slow,) = [n for n in json.loads(capsys.readouterr().out)["notes"] if "bf16" in n]
    for heads in (15, 14, 12, 10):
        assert f"{161 * heads + 256} (mamba_num_heads {8 * heads})" in slow
    assert "TP 8" in slow and "2671" in slow and "2832" not in slow  # 16 heads: 177 blocks of 16


def test_rows_of_sixteen_are_named_apart() -> None:
    space = family_of(load_config(NANO).config).space
    _, no_fp8 = alignment_notes(space, 8)
    assert "1960 (ffn_hidden_size 15680)" in no_fp8 and "NVFP4" in no_fp8  # 122.5 blocks of 16
    assert [width for what, width, _ in unaligned_widths(space, 1) if "in_proj" in what] == [8 * 2671]
    assert alignment_notes(space, 3) == []  # not legal: a problem of its own


def test_head_channels_count_too() -> None:
    space = family_of(load_config(NANO, ["elastic.dims.mamba_head_dim={choices: [80, 77]}"]).config).space
    found = {width: sizes for what, width, sizes in unaligned_widths(space, 8) if what == "out_proj columns"}
    assert found[15 * 77] == {"mamba_num_heads": 120, "mamba_head_dim": 77}


def test_channels_that_causal_conv1d_refuses_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 heads of 77 channels and 2 x 128 states a rank. A problem where that kernel runs, a note elsewhere."""
    run = load_config(NANO, ["elastic.dims.mamba_head_dim={choices: [80, 77]}"]).config
    (note,) = convolution_notes(family_of(run).space, 8)
    assert f"{15 * 77 + 256} (mamba_num_heads 120, mamba_head_dim 77)" in note and "TP 8" in note
    assert f"{16 * 77 + 256} " not in note and note in plan(run)["notes"]
    assert convolution_notes(family_of(load_config(NANO).config).space, 8) == []
    assert checks.kernel_problems(run, family_of(run)) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checks.kernel_problems(run, family_of(run)) == []  # our own kernels take any width
    monkeypatch.setattr(checks, "has_mamba_kernels", lambda: True)
    assert [p.message for p in checks.kernel_problems(run, family_of(run))] == [note]


def test_ratios_of_a_large_parent_round_to_tiles() -> None:
    hidden = choices(NANO, "elastic.dims.hidden_size={choices: [1.0, 0.83]}")["hidden_size"]
    assert hidden == (5120, 4224) and all(n % 64 == 0 for n in hidden)
    assert choices(NANO, "elastic.dims.ffn_hidden_size={choices: [0.71]}")["ffn_hidden_size"][1] % 64 == 0
    heads = choices(NANO, "elastic.dims.mamba_num_heads={choices: [0.6]}")["mamba_num_heads"]
    assert heads == (128, 64)  # 8 a rank at TP 8, not the nearest 80


def test_the_family_does_not_depend_on_the_layout() -> None:
    word = "elastic.dims.mamba_num_heads={choices: [0.6]}"
    assert choices(NANO, word) == choices(NANO, word, "train.tensor_model_parallel_size=2")


def test_no_two_ratios_become_one_by_default() -> None:
    """128 heads at 0.875, 0.75 and 0.625: multiples of 64 would leave two sizes, multiples of 16 keep all four."""
    assert choices("nemotron_h_8b.yaml")["mamba_num_heads"] == (128, 112, 96, 80)
    assert choices("tiny_parent.yaml")["mamba_num_heads"] == (16, 12, 8)
    three = "elastic.dims.mamba_num_heads={choices: [1.0, 0.875, 0.7]}"
    assert choices("nemotron_h_8b.yaml", three)["mamba_num_heads"] == (128, 112, 96)  # of 16; by the groups alone 88


def test_a_given_multiple_holds() -> None:
    word = "elastic.multiple_of.mamba_num_heads=64"
    assert choices("nemotron_h_8b.yaml", word)["mamba_num_heads"] == (128, 64)
    assert choices("tiny_parent.yaml", "elastic.multiple_of.hidden_size=1")["hidden_size"] == (128, 112, 96)
    assert choices(NANO, "elastic.multiple_of.hidden_size=64")["hidden_size"][1] == 4800  # integers stay as given


def test_a_small_parent_rounds_to_eight() -> None:
    arch = family_of(load_config("tiny_parent.yaml").config).architecture
    assert rounding_step("hidden_size", [1.0, 0.8], 96, 1, arch, {}) == 8  # 80, not 77
    assert rounding_step("ffn_hidden_size", [0.75], 48, 12, arch, {}) == 12  # 24 would make 36 the parent's 48


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("elastic.multiple_of.hidden_size=0", "elastic.multiple_of.hidden_size: 0 must be above 0"),
        ("elastic.multiple_of.hidden=8", "elastic.multiple_of.hidden: is no width; did you mean 'hidden_size'"),
        ("elastic.multiple_of.num_layers=2", "elastic.multiple_of.num_layers: is no width"),
        ("elastic.multiple_of.hidden_size=256", "elastic.multiple_of.hidden_size: 256 .* at most the parent's 128"),
    ],
)
def test_a_multiple_that_cannot_be_is_refused(word: str, message: str) -> None:
    with pytest.raises(ProblemsError, match=message):
        family_of(load_config("tiny_parent.yaml", [word]).config)


def test_values_written_before_keep_their_sizes() -> None:
    """A run's config.json without the key was made when 0.8 of 96 was 77."""
    values = load_config("tiny_parent.yaml", ["elastic.dims.hidden_size={choices: [0.8]}"]).values
    assert family_of(load_values(values)).space.dims["hidden_size"].choices == (128, 104)
    before = {**values, "elastic": {k: v for k, v in values["elastic"].items() if k != "multiple_of"}}
    assert family_of(load_values(before)).space.dims["hidden_size"].choices == (128, 102)
