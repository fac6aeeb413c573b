"""Which expert-parallel sizes are legal, what `plan` says of those that are not, and what a GPU holds with one."""

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.cost.gpu_layout import GpuLayout
from nemo_elastic.cost.held_memory import held_bytes, stage_rows
from nemo_elastic.cost.roofline import layer_forward
from nemo_elastic.distill.gpu_work import Work
from nemo_elastic.distill.layouts import candidates
from nemo_elastic.family import Family, family_of
from nemo_elastic.problems import ProblemsError
from nemo_elastic.processes.launchers import data_parallel_size

CONF = "nemotron_3_nano_30b_a3b.yaml"


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of(load_config(CONF).config)


@pytest.mark.parametrize(
    ("conf", "word", "key", "words"),
    [
        (CONF, "train.expert_model_parallel_size=3", "train.expert_model_parallel_size",
         "3 must divide elastic.expert_groups=8; possible: 1, 2, 4, 8, or other groups"),
        ("tiny_parent.yaml", "train.expert_model_parallel_size=2", "train.expert_model_parallel_size",
         "2 needs a model with experts, and this one has no layer of them; set 1"),
        (CONF, "train.expert_model_parallel_size=0", "train.expert_model_parallel_size", "0 must be above 0"),
        (CONF, "elastic.expert_groups=24", "elastic.expert_groups", "24 must divide model.num_moe_experts=128"),
        (CONF, "elastic.expert_groups=0", "elastic.expert_groups", "0 must be above 0; empty: elastic.ffn_groups"),
        (CONF, "train.expert_tensor_parallel_size=1", "train.expert_tensor_parallel_size", ""),
    ],
)  # fmt: skip
def test_a_bad_size_is_refused_with_one_error(
    capsys: pytest.CaptureFixture, conf: str, word: str, key: str, words: str
) -> None:
    assert main(["plan", "--config", conf, word]) == 2
    told = capsys.readouterr()
    said = " ".join((told.out + told.err).split())
    assert f"{key}: {words}" in said, said
    assert said.count(f"{key}: ") == 1


def test_processes_must_fill_it() -> None:
    assert data_parallel_size(16, 2, 2, expert_model_parallel_size=4) == 4
    words = r"4 must divide the 2 data-parallel ranks of 8 processes; start a multiple of 16, or set a divisor of 2"
    with pytest.raises(ProblemsError, match=words):
        data_parallel_size(8, 2, 2, expert_model_parallel_size=4)
    assert data_parallel_size(8, 2, 1, context_parallel_size=2, expert_model_parallel_size=4) == 2
    with pytest.raises(ProblemsError, match=r"3 must divide the 4 data-parallel ranks .* multiple of 12"):
        data_parallel_size(8, 2, 1, context_parallel_size=2, expert_model_parallel_size=3)


def test_more_groups_allow_larger_sizes() -> None:
    words = ["elastic.expert_groups=16", "elastic.dims.num_moe_experts.choices=[128, 96, 64]"]
    run = load_config(CONF, [*words, "train.expert_model_parallel_size=16"]).config
    space = family_of(run).space
    assert space.groups.experts == 16 and space.groups.ffn == 8
    assert space.dims["num_moe_experts"].groups == 16 and space.dims["moe_ffn_hidden_size"].groups == 8
    with pytest.raises(ProblemsError, match="120 must be a multiple of 16"):
        family_of(load_config(CONF, [words[0]]).config)


def test_a_gpu_holds_its_share_of_the_experts(family: Family) -> None:
    """Weights by the table; the optimizer's states of experts over fewer GPUs, so that all of them hold them once."""
    work = Work(load_config(CONF).config, family, {b.name: family.space.full_subnet() for b in family.budgets})
    hows = [GpuLayout(data_parallel_size=8, expert_model_parallel_size=ep) for ep in (1, 4)]
    rows = [stage_rows(work.table_of(how), how, 0) for how in hows]
    for name, whole in rows[0].items():
        assert rows[1][name] * (4 if ".experts." in name and "shared" not in name else 1) == whole, name
    held = [held_bytes(work.table_of(how), how, 0) for how in hows]
    assert held[1]["weights"] == pytest.approx(2 * sum(rows[1].values()), rel=1e-4)
    assert held[1]["weights"] < 0.4 * held[0]["weights"]
    assert held[1]["optimizer"] == pytest.approx(held[0]["optimizer"], rel=1e-4)
    assert held[1]["teacher"] == 2 * sum(rows[1].values())


def test_layouts_have_it_and_its_exchange(family: Family) -> None:
    run = load_config(CONF).config
    work = Work(run, family, {b.name: family.space.full_subnet() for b in family.budgets})
    sizes = {how.expert_model_parallel_size for how in candidates(work, 64)}
    assert sizes == {1, 2, 4, 8}
    how = next(how for how in candidates(work, 64) if how.expert_model_parallel_size == 4)
    running, layer = work.stages[0][0][2][0].running, family.architecture.hybrid_override_pattern.index("E")
    seconds = layer_forward(work.table_of(how), how, run.report.gpu, running, layer, 8192)
    sent = 2 * 2 * 6 * running.hidden_size(family.architecture) * how.tokens(8192) * 3 / 4  # two ways, bf16, top-k 6
    links = (run.report.gpu.node_gbs, run.report.gpu.network_gbs)
    assert any(seconds.experts == pytest.approx(sent / (speed * 1e9), rel=1e-6) for speed in links)
    dense = load_config("tiny_parent.yaml").config
    of_dense = family_of(dense)
    without = Work(dense, of_dense, {b.name: of_dense.space.full_subnet() for b in of_dense.budgets})
    assert {how.expert_model_parallel_size for how in candidates(without, 8)} == {1}
