"""What a run logs: every scalar in TensorBoard and in metrics.csv, Megatron's norms, resumed without a seam."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from small_run import Server, records

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
BUDGETS = ("full", "large", "small")
DIMS = ("hidden_size", "ffn_hidden_size", "mamba_num_heads", "num_layers")
TIMES = ("step/seconds", "step/tokens_per_second")
DUE = [3, 6, 9, 12, 15, 16]


def expected_names() -> set[str]:
    names = {"step/tau", "step/lr", *TIMES, "grad_norm/model", "grad_norm/router"}
    names |= {
        f"budget/{b}/{k}" for b in BUDGETS for k in ("kd", "ce", "hidden", "tokens", "budget_loss", "heldout_loss")
    }
    names |= {f"size/{b}/{d}" for b in BUDGETS for d in (*DIMS, "mamba_head_dim", "num_attention_heads")}
    names |= {f"router/{b}/{k}" for b in BUDGETS[1:] for k in ("price", "argmax_error", "error")}
    return names | {f"router/{b}/entropy/{d}" for b in BUDGETS[1:] for d in DIMS}


def tensorboard(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "logs" / "tensorboard"), size_guidance={"scalars": 0})
    return found.Reload()


def table(out: Path) -> list[dict[str, str]]:
    with (out / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_tensorboard_and_the_table_hold_every_scalar(small_runs: Server) -> None:
    out = small_runs.folder / "whole"
    board, rows = tensorboard(out), table(out)
    assert expected_names() <= set(board.Tags()["scalars"])
    assert set(rows[0]) == expected_names() | {"step", "phase"}
    steps = [int(r["step"]) for r in rows if r["phase"] != "validation"]
    assert steps == DUE
    assert [int(r["step"]) for r in rows if r["phase"] == "validation"] == [0, 6, 12, 16]
    for name in expected_names():
        points = {e.step: e.value for e in board.Scalars(name)}
        written = {int(r["step"]): float(r[name]) for r in rows if r[name] != ""}
        assert points.keys() == written.keys() and points
        assert all(math.isclose(points[s], v, rel_tol=1e-5, abs_tol=1e-7) for s, v in written.items()), name


def test_rows_are_means_over_their_steps(small_runs: Server) -> None:
    out = small_runs.folder / "whole"
    log = {r["step"]: r for r in records(out, "train")}
    rows = {int(r["step"]): r for r in table(out) if r["phase"] != "validation"}
    assert sorted(log) == list(range(1, 17))
    for before, step in zip([0, *DUE], DUE, strict=False):
        for name in BUDGETS:
            parts = [log[s]["budgets"][name] for s in range(before + 1, step + 1) if name in log[s]["budgets"]]
            tokens = sum(p["tokens"] for p in parts)
            if tokens:
                mean = sum(p["kd"] * p["tokens"] for p in parts) / tokens
                assert float(rows[step][f"budget/{name}/kd"]) == pytest.approx(mean, rel=1e-6)
            assert float(rows[step][f"budget/{name}/tokens"]) == log[step]["tokens"][name]


def test_the_log_keeps_the_routers_probabilities_and_what_they_mean(small_runs: Server) -> None:
    log = {r["step"]: r for r in records(small_runs.folder / "whole", "train")}
    shown = {s: r["router"] for s, r in log.items() if "router" in r and "probabilities" in r["router"]["small"]}
    assert list(shown) == [6, 9, 12]  # due steps on which the router moves: soft, hard, hard
    for router in shown.values():
        for name in ("large", "small"):
            probabilities = router[name]["probabilities"]
            assert {d: (len(p), len(p[0])) for d, p in probabilities.items()} == {
                "hidden_size": (1, 3), "ffn_hidden_size": (1, 3), "mamba_num_heads": (3, 2), "num_layers": (1, 3),
            }  # fmt: skip
            for dim, rows in probabilities.items():
                assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in rows)
                mean = sum(-p * math.log(p) for row in rows for p in row if p) / len(rows)
                assert router[name]["entropy"][dim] == pytest.approx(mean, abs=1e-3)
    last = log[16]
    assert last["sizes"]["full"]["hidden_size"] == 48 and last["sizes"]["full"]["num_layers"] == 8
    assert last["sizes"]["small"]["hidden_size"] <= 48 and last["phase"] == "frozen"
    assert {"kd", "ce", "hidden", "tokens", "budget_loss"} == set(last["budgets"]["full"])


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), 1),
        (("train.tensor_model_parallel_size=2",), 2),
        (("train.pipeline_model_parallel_size=2",), 2),
        ((), 2),
    ],
    ids=["one", "tp2", "pp2", "dp2"],
)
def test_norms_are_those_megatron_clips_by_in_every_layout(
    small_runs: Server, overrides: tuple[str, ...], size: int
) -> None:
    whole = small_runs.folder / "whole"
    out = whole
    if size > 1:
        out = small_runs.ranked(f"norms_{'_'.join(overrides) or 'dp2'}")
        more = ("train.loggers=[tensorboard]", "train.log_every_steps=1")
        small_runs.run(out, *overrides, *more, size=size)
    log = {r["step"]: r for r in records(out, "train")}
    reference = {r["step"]: r for r in records(whole, "train")}
    for step in (1, 2, 4, 5):  # later the layouts drift apart, as sums in another order do
        for key in ("grad_norm", "router_grad_norm"):
            assert log[step][key] == pytest.approx(reference[step][key], rel=2e-3, abs=1e-6), (step, key)
    assert log[1]["router_grad_norm"] == 0.0 and log[4]["router_grad_norm"] > 0
    megatrons = sorted(tensorboard(out).Scalars("grad_norm"), key=lambda e: e.step)
    ours = {s: math.hypot(r["grad_norm"], r["router_grad_norm"]) for s, r in log.items()}
    assert megatrons
    for event in megatrons:  # NeMo counts from zero
        assert event.value == pytest.approx(ours[event.step + 1], rel=1e-5)


def test_a_resumed_run_appends_without_loss_or_repetition(small_runs: Server) -> None:
    whole, out = small_runs.folder / "whole", small_runs.ranked("seam")
    logger = "train.loggers=[tensorboard]"
    small_runs.run(
        out, logger, codes=[2], poison={"step": 11, "layer": 2}
    )  # rows of steps 9 and 10 are ahead of step 8
    assert int(table(out)[-1]["step"]) == 9
    small_runs.run(out, logger, resume=True)

    def plain(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]

    assert plain(table(out)) == plain(table(whole))
    board, other = tensorboard(out), tensorboard(whole)
    for name in expected_names() - set(TIMES):
        one, two = ([(e.step, e.value) for e in b.Scalars(name)] for b in (board, other))
        assert one == two, name


def test_wandb_without_a_key_is_refused_before_anything_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from nemo_elastic.config import load_config
    from nemo_elastic.family import Configured
    from nemo_elastic.mcore.family.checks import check_inputs
    from nemo_elastic.problems import ProblemsError

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    run = Configured(load_config("tiny_parent.yaml", ["train.loggers=[wandb]"]))
    with pytest.raises(ProblemsError, match=r"train\.loggers: wandb has no API key"):
        check_inputs(run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_inputs(run)


def test_wandb_offline(small_runs: Server) -> None:
    pytest.importorskip("wandb")
    out = small_runs.ranked("wandb")
    words = ("train.loggers=[wandb]", "train.wandb_project=trial")
    small_runs.run(out, *words, environment={"WANDB_MODE": "offline"})
    (folder,) = (out / "logs" / "wandb").glob("offline-run-*")
    assert folder.name.endswith((out / "logs" / "wandb_id.txt").read_text().strip())
    assert any(f.stat().st_size > 10_000 for f in folder.glob("*.wandb"))
