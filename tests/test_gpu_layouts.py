"""`plan --gpus`: layouts by hand, what must hold between them, and what is refused."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.cost.activation_memory import saved_bytes
from nemo_elastic.cost.counts import flops
from nemo_elastic.cost.gpu_layout import GpuLayout, Running
from nemo_elastic.cost.roofline import gather_seconds, link_gbs, student_seconds
from nemo_elastic.distill.gpu_work import Work
from nemo_elastic.distill.layouts import candidates, layouts, memory_bytes, stage_seconds
from nemo_elastic.family import family_of
from nemo_elastic.plan.of_run import plan

ROOT = Path(__file__).resolve().parent.parent
NANO = "nemotron_nano_12b_v2.yaml"


@pytest.fixture(scope="module")
def work() -> Work:
    return work_of()


def work_of(*overrides: str, parent: str = NANO) -> Work:
    run = load_config(parent, overrides).config
    family = family_of(run)
    return Work(run, family, {b["name"]: family.space.subnet_from_dict(b["subnet"]) for b in plan(run)["budgets"]})


EIGHT = GpuLayout(tensor_model_parallel_size=8, sequence_parallel=True, recompute_granularity="full")


def test_the_12b_on_eight_gpus_by_hand(work: Work) -> None:
    """Whole numbers of the published sizes, and the page's words for them."""
    rows = {"M": 22656 * 5120 // 8 + 5120 * 10240 // 8 + (12288 * 5 + 128 * 3 + 10240) // 8 + 5120}
    rows |= {"*": (40 + 16) * 128 * 5120 // 8 + 40 * 128 * 5120 // 8 + 5120, "-": 2 * 20480 * 5120 // 8 + 5120}
    pattern = work.family.architecture.hybrid_override_pattern
    n = sum(rows[letter] for letter in pattern) + 2 * 131072 * 5120 // 8 + 5120
    found = memory_bytes(work, EIGHT)
    router = sum(work.router)
    assert n == 1_539_032_384
    assert found["teacher"] == 2 * n and found["weights"] == pytest.approx(2 * n + 4 * router, rel=1e-4)
    assert found["gradients"] == pytest.approx(4 * (n + router), rel=1e-4)
    assert found["optimizer"] == pytest.approx(12 * n + 8 * router, rel=1e-4)
    assert found["activations"] == 49152 * (62 * 2 * 5120 / 8 + 4 * 10241 / 8 + 9)
    assert found["at_work"] == 2 * 49152 * 10240 + 6 * 5120 * (49152 + 16384) + 12 * 2048 * 16384
    assert found["stage"] == 1 and found["reserve"] == 5e9
    page = " ".join((ROOT / "docs" / "plan.md").read_text().split("**By hand**")[1].split())
    for number in (f"{n:,}", "3.08 GB", "4.15 GB", "3.42 GB", "43.4 GB"):
        assert number in page
    assert f"{found['total'] / 1e9:.1f}" == "43.4" and f"{found['activations'] / 1e9:.2f}" == "4.15"


def test_seconds_by_hand(work: Work) -> None:
    """Products of a long step: FLOPs of teacher, students and recomputation over all GPUs; one gather of the stream."""
    found = stage_seconds(work, EIGHT, 1)["seconds"]
    arch, layout, total = work.family.architecture, work.family.layout, 0.0
    full = flops(layout, work.family.space.full_subnet(), sequence_length=49152)
    for _, weight, row in work.stages[1]:
        for share in row:
            subnet = work.family.space.full_subnet() if share.running.full_width else share.running.subnet
            one, head = flops(layout, subnet, sequence_length=49152), 2 * 49152 * subnet.hidden_size * arch.vocab_size
            total += weight * share.per_micro_batch * (4 * one - head)
    assert found["product"] == pytest.approx(512 * (full + total) / 8 / 660e12, rel=1e-6)
    gather = 2 * 49152 * 5120 * 7 / 8 / 360e9
    assert gather_seconds(work.run.report.gpu, 1, 8, 2 * 49152 * 5120) == pytest.approx(gather)
    teacher_alone = 125 * gather
    assert found["tensor_parallel"] > 512 * teacher_alone
    micro_batch = stage_seconds(work, EIGHT, 1)["step_seconds"] / 512
    page = " ".join((ROOT / "docs" / "plan.md").read_text().split("**By hand**")[1].split())
    words = f"{1e3 * gather:.2f} ms: a teacher's forward has 124 of them and one in front of the head"
    assert f"{words}, {1e3 * teacher_alone:.0f} ms of a micro-batch's {micro_batch:.1f} s" in page
    assert found["bubble"] == found["context_parallel"] == found["gradients"] == 0


def test_what_recomputation_does_again_by_hand(work: Work) -> None:
    """Of the parent: all layers, or two products per MLP and attention's scores; gathers of what is redone whole."""
    full = Running(subnet=work.family.space.full_subnet())
    pattern, layout = work.family.architecture.hybrid_override_pattern, work.table(8)
    ways = [replace(EIGHT, recompute_granularity=way) for way in (None, "selective", "full")]
    none, some, all_ = (student_seconds(layout, how, work.run.report.gpu, full, 0, 49152) for how in ways)
    mlps, attentions = pattern.count("-"), pattern.count("*")
    again = 4 * 49152 * 5120 * 20480 * mlps + 4 * 49152**2 * 5120 * attentions
    gather = 2 * 49152 * 5120 * 7 / 8 / 360e9
    assert some.product - none.product == pytest.approx(again / 8 / 660e12)
    assert some.tensor - none.tensor == pytest.approx(2 * mlps * gather)
    whole = flops(layout, full.subnet, sequence_length=49152) - 2 * 49152 * 5120 * 131072
    assert all_.product - none.product == pytest.approx(whole / 8 / 660e12)
    assert all_.tensor - none.tensor == pytest.approx(2 * 62 * gather)
    assert some.context == 0 and none.memory < some.memory < all_.memory


def test_a_transformer_by_hand() -> None:
    """Llama 3.1 8B, selective recomputation: gated MLPs keep nothing, attention its turned queries and keys."""
    work = work_of(parent="llama_3_1_8b.yaml")
    how = next(h for h in candidates(work, 8) if (h.tensor_model_parallel_size, h.micro_batch_size) == (8, 1)
               and h.recompute_granularity == "selective")  # fmt: skip
    layers = 32 * (4096 * (48 * 128 + 32 * 128) + 3 * 14336 * 4096)
    n = (layers + 2 * 128256 * 4096) // 8 + 65 * 4096
    full, long = Running(subnet=work.family.space.full_subnet()), 49152
    assert memory_bytes(work, how)["teacher"] == 2 * n
    norms = 65 * 4 * 8193 / 8 + 64 * 2 * 4096 / 8
    heads = 32 * (2 * (3 * 32 + 3 * 8) * 128 / 8 + 8 * 128)
    assert saved_bytes(work.table(8), how, full, 0, long, "selective") == long * (norms + heads + 9)
    gated = saved_bytes(work.table(8), how, full, 0, long, None) - 32 * long * 4 * 32 / 8  # and a log-sum-exp a head
    assert gated == long * (norms + heads + 9 + 32 * 8 * 14336 / 8)
    every = student_seconds(work.table(8), replace(how, recompute_granularity=None), work.run.report.gpu, full, 0, long)
    again = student_seconds(work.table(8), how, work.run.report.gpu, full, 0, long)
    redone = long * 6 * 4096 * 14336 + 4 * long**2 * 4096
    assert again.product - every.product == pytest.approx(32 * redone / 8 / 660e12)


@pytest.mark.parametrize("pattern", ["M-M-", "M*M*", "*-*-", "MMMM"])
def test_a_pattern_without_a_kind(pattern: str) -> None:
    """What the model has no layer of costs nothing, and its sizes are not asked for."""
    work = work_of(f"model.hybrid_override_pattern={pattern!r}", "elastic.dims.num_layers.choices=[4,3]",
                   "elastic.budgets={12b: 1.0, 9b: 0.8, 6b: 0.7}")  # fmt: skip
    found = memory_bytes(work, EIGHT)
    assert found["activations"] == 49152 * (4 * 2 * 5120 / 8 + 4 * 10241 / 8 + 9)
    kept = memory_bytes(work, replace(EIGHT, recompute_granularity=None))["activations"]
    assert kept > 4 * found["activations"]


def test_links(work: Work) -> None:
    """In a node NVLink; beyond it the network, by as many ports as the group has GPUs in a node."""
    gpu = work.run.report.gpu
    assert link_gbs(gpu, 1, 8) == link_gbs(gpu, 4, 2) == 360
    assert [link_gbs(gpu, stride, 64 // stride) for stride in (8, 4, 2, 1)] == [40, 80, 160, 320]


def test_layouts_that_fit_are_ordered_and_legal(work: Work) -> None:
    found = layouts(work, 64, 80.0)
    rows = found["layouts"]
    assert rows and [r["days"] for r in rows] == sorted(r["days"] for r in rows)
    for row in rows:
        tp, pp, cp, dp = (row[f"{n}_parallel_size"] for n in ("tensor_model", "pipeline_model", "context", "data"))
        assert tp * pp * cp * dp == 64 and cp in (1, 2, 4, 8) and 62 % pp == 0 and 8 % tp == 0
        assert row["memory_gb"] <= 80 and sum(row["memory_bytes"].values()) == pytest.approx(row["memory_gb"] * 1e9)
        assert all(s.global_batch_size % (dp * row["micro_batch_size"]) == 0 for s in work.run.train.stages)
        seconds = sum(s.steps * p["step_seconds"] for s, p in zip(work.run.train.stages, row["stages"], strict=True))
        assert row["days"] == pytest.approx(seconds / 86400)
    fewer = layouts(work, 64, 40.0)["layouts"]
    assert 0 < len(fewer) < len(rows) and all(row in rows for row in fewer)
    assert found["leanest"]["memory_gb"] <= min(row["memory_gb"] for row in rows)


def test_context_parallelism_halves_what_is_kept_and_shares_the_optimizer(work: Work) -> None:
    rows = layouts(work, 64, 80.0)["layouts"]
    assert {row["context_parallel_size"] for row in rows} >= {1, 2, 4}
    alone = layouts(work, 64, 80.0, contexts=(1,))["layouts"]
    assert alone == [row for row in rows if row["context_parallel_size"] == 1]
    one = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "recompute_granularity": "full"}
    halves = [memory_bytes(work, GpuLayout(**one, context_parallel_size=cp)) for cp in (1, 2)]
    assert halves[1]["activations"] == pytest.approx(halves[0]["activations"] / 2)
    assert halves[1]["optimizer"] == pytest.approx(halves[0]["optimizer"] / 2, rel=1e-6)


def test_what_the_run_says_changes_what_fits(work: Work) -> None:
    """No teacher, a cached one, several budgets a batch, fp32."""
    base = memory_bytes(work, EIGHT)
    none = memory_bytes(work_of("distill.kd_weight=0", "distill.ce_weight=1"), EIGHT)
    assert none["teacher"] == 0 and none["at_work"] < base["at_work"]
    cached = memory_bytes(work_of("distill.teacher_cache=/tmp/states"), EIGHT)
    assert cached["teacher"] == 2 * 131072 * 5120 / 8
    alone = memory_bytes(work_of("distill.teacher=self"), EIGHT)
    assert alone["teacher"] == 0 and alone["activations"] == base["activations"]
    assert (
        none["at_work"] <= alone["at_work"] < base["at_work"]
    )  # the largest student has no teacher's logits beside it
    held = memory_bytes(work_of("distill.teacher=self", "distill.teacher_cache=/tmp/states"), EIGHT)
    assert held["teacher"] == cached["teacher"]
    several = memory_bytes(work_of("distill.budgets_per_batch=3"), EIGHT)
    assert base["activations"] < several["activations"] < 3 * base["activations"]
    assert {how.element for how in candidates(work_of("train.precision='32'"), 8)} == {4}
    raced, learned = (
        {s.running.mode for _, _, row in of.stages[0] for s in row} for of in (work, work_of("router.shapes=learned"))
    )
    assert raced == {"whole", "sliced"} and {"whole", "soft", "sliced"} <= learned


def test_a_plan_of_eight_gpus_within_two_seconds_and_without_torch() -> None:
    """CPU seconds of the whole process: the machine may be busy."""
    code = (
        "import sys; from nemo_elastic.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["plan", "--config", NANO, "--gpus", "8", "--gpu-memory", "80", "--json"]
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = json.loads(shown.stdout)["layouts"]
    names = {f"{what}_parallel_size" for what in ("tensor_model", "pipeline_model", "context", "data")}
    names |= {"micro_batch_size", "recompute_granularity", "memory_gb", "step_seconds", "days"}
    assert rows and all(names <= set(row) for row in rows)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus: 0 must be above 0"),
        (["--gpus", "1000000000000"], "--gpus: 1000000000000 must be at most 1,048,576"),
        (["--gpus", "8", "--gpu-memory", "-1"], "--gpu-memory: -1 must be a number of GB above 0"),
        (["--gpu-memory", "80"], "--gpu-memory: belongs to --gpus N"),
        (["--gpus", "8", "--search", "uniform"], "--gpus: lays out a configured run"),
        (["--gpus", "8", "report.gpu.network_gbs=0"], "report.gpu.network_gbs: 0.0 must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", NANO, *words]) == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_nothing_fits(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", NANO, "--gpus", "8", "--gpu-memory", "20", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["layouts"] and "the leanest needs 43.4 GB" in found["problems"][0]["message"]
    assert main(["plan", "--config", NANO, "--gpus", "7", "--json"]) == 2
    assert (
        "filled by no layout: TP x PP x CP x DP, with batches dealt in whole micro-batches; nearest: 4, 8"
        in json.loads(capsys.readouterr().out)["problems"][0]["message"]
    )
    assert main(["plan", "--config", NANO, "--gpus", "8", "train.stages=[]", "--json"]) == 2
    assert "needs train.stages" in json.loads(capsys.readouterr().out)["problems"][0]["message"]


def test_the_table_says_what_was_assumed(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", NANO, "--gpus", "64", "report.gpu.matmul_tflops=700"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("estimated, never measured", "products 700 TFLOP/s", "(--json)"):
        assert words in shown, words
