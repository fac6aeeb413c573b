"""What context parallelism asks of a family, said before anything is started; and what a rank gets of a sequence."""

import re
from types import SimpleNamespace

import pytest
import torch

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.family import family_of
from nemo_elastic.mcore.kernels.context import chunk_spans, own_chunks, own_positions
from nemo_elastic.plan.context import chunk_step, context_problems, shares_heads

NANO = "nemotron_nano_12b_v2.yaml"


def problems(*words: str) -> dict[str, str]:
    run = load_config(NANO, ["elastic.subnets={}", *words]).config
    return {p.key: p.message for p in context_problems(family_of(run), run.train)}


def test_the_published_run_may_have_context_parallelism() -> None:
    """49,152 tokens, 8 groups of heads, children of 9, 10 and more in each: no rank gets a part of a group."""
    family = family_of(load_config(NANO).config)
    assert [n for n in range(1, 17) if shares_heads(family, 1, n)] == [1, 2, 4, 8]
    assert problems("train.context_parallel_size=2", "train.tensor_model_parallel_size=4") == {}
    assert problems("train.context_parallel_size=4", "train.tensor_model_parallel_size=2") == {}


def test_heads_of_a_child_that_ranks_cannot_share_are_named() -> None:
    """8 groups at TP 8: two ranks share one group, so a child needs an even number of heads in each."""
    wrong = problems(
        "elastic.dims.mamba_num_heads.choices=[128,120,72]", "elastic.multiple_of.mamba_num_heads=8",
        "train.tensor_model_parallel_size=8", "train.context_parallel_size=2",
    )  # fmt: skip
    assert list(wrong) == ["train.context_parallel_size"]
    assert (
        "mamba_num_heads 120, mamba_num_heads 72 at tensor parallel 8; possible: 1"
        in wrong["train.context_parallel_size"]
    )
    assert "mamba_num_heads 128" in problems("train.context_parallel_size=3")["train.context_parallel_size"]


@pytest.mark.parametrize(
    ("length", "tp", "cp", "near"), [(250, 1, 2, "248, 252"), (100, 1, 4, "96, 104"), (68, 4, 2, "64, 72")]
)
def test_lengths_are_refused_with_the_nearest_legal_ones(length: int, tp: int, cp: int, near: str) -> None:
    stages = f"train.stages=[{{steps: 1, seq_length: {length}, global_batch_size: 8}}]"
    sizes = (f"train.tensor_model_parallel_size={tp}", f"train.context_parallel_size={cp}")
    found = problems(stages, *sizes, f"train.sequence_parallel={str(tp > 1).lower()}")
    assert list(found) == ["train.stages.0.seq_length"] and found["train.stages.0.seq_length"].endswith(near)
    assert chunk_step(tp, cp) in (4, 8)


def test_the_commands_refuse_it(capsys: pytest.CaptureFixture) -> None:
    words = ["--config", "tiny_parent.yaml", "train.context_parallel_size=2", "train.stages.0.seq_length=254"]
    assert main(["plan", *words]) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert (
        "train.stages.0.seq_length: 254 must be a multiple of 4 for 2 context-parallel ranks; nearest: 252, 256" in said
    )


def test_ranks_get_the_first_and_the_last_of_what_is_left() -> None:
    """As Megatron deals a batch: rank 0 of 2 has chunks 0 and 3."""
    groups = [SimpleNamespace(size=lambda: 2, rank=lambda r=r: r) for r in range(2)]
    whole = torch.arange(8)
    assert [own_positions(8, g).tolist() for g in groups] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [own_chunks(whole, g, dim=0).tolist() for g in groups] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [chunk_spans(4, g) for g in groups] == [[(0, 2), (6, 8)], [(2, 4), (4, 6)]]
