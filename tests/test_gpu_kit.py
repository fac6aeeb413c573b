"""The kit for the first GPU machine: its checks rehearse here, a hang is cut, the pages say what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "gpu"
STAGES = {
    "stage0_fine.py": """
import time
@check(stage=0, seconds=0.1)
def slow(machine): "Outlives its limit"; time.sleep(30)
@check(stage=0, seconds=9)
def after(machine): "Runs all the same"; print("noise"); return Found({"value": 1}, stand_in=True)
@check(stage=0, seconds=9)
def wrong(machine): "Fails"; assert False, "1 is not 2"
""",
    "stage1_hangs.py": """
import signal, time
@check(stage=1, seconds=0.1)
def deaf(machine):
    "Hangs where no signal of ours is heard"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)
""",
    "stage9_fine.py": """
@check(stage=9, seconds=9)
def last(machine): "Still reports"; return Found({"value": 2})
""",
}
SOURCE = """
template<typename input_t, typename weight_t>
void f(Params &params) {
    if (params.width == 2) {
        launch<128, 2, input_t, weight_t>(params);
    } else if (params.width == 3) {
        launch<128, 3, input_t, weight_t>(params);
    } else if (params.width == 4) {
        launch<128, 4, input_t, weight_t>(params);
    }
}
template void f<float, float>(Params &params);
template void f<at::Half, float>(Params &params);
template void f<at::BFloat16, at::BFloat16>(Params &params);
template void f<at::BFloat16, float>(Params &params);
"""


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (FOLDER.parent, FOLDER):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def pages() -> ModuleType:
    return __import__("pages")


def run(output: Path, *words: str) -> dict[str, Any]:
    """The result file of `run.sh` on this CPU."""
    command = [str(FOLDER / "run.sh"), "--device", "cpu", "--tiny", "--output", str(output), *words]
    environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "PYTHON": sys.executable, "HOME": str(output.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.is_file(), done.stderr[-3000:]
    return json.loads(output.read_text()) | {"code": done.returncode, "said": done.stderr[-6000:]}


def test_a_stage_that_hangs_is_cut_and_the_rest_reports(tmp_path: Path) -> None:
    folder = tmp_path / "checks"
    folder.mkdir()
    for name, text in STAGES.items():
        (folder / name).write_text("from registry import Found, check\n" + text)
    found = run(tmp_path / "out.json", "--folder", str(folder), "--limit", "3", "--only", "0,1,9")
    lines = {line["check"]: line for line in found["checks"]}
    assert list(lines) == ["slow", "after", "wrong", "deaf", "last"] and found["code"] == 1
    assert lines["slow"]["error"] == "cut after its 0.5 s"
    assert lines["after"]["ok"] and lines["after"]["stand_in"] and lines["after"]["values"] == {"value": 1}
    assert lines["wrong"]["error"] == "AssertionError: 1 is not 2"
    assert lines["deaf"]["error"] == "cut with its stage" and "exit code 124" in found["said"]
    assert lines["last"]["ok"] and lines["last"]["values"] == {"value": 2}
    assert found["run"]["device"] == "cpu" and found["run"]["tiny"] and found["run"]["commit"] != "unknown"


@pytest.mark.parametrize("name", ["ceilings", "scan_torch", "conv_cuda", "kd_fused", "decode_step"])
def test_a_check_rehearses_on_the_cpu(name: str) -> None:
    import checks
    import registry

    check = registry.all_checks()[name]
    line = checks.report(check, registry.Machine("cpu", tiny=True))
    assert line["ok"], line
    assert line["stand_in"] is (check.needs_kernels or name == "decode_step")
    assert all(key in line["values"] for key in check.predicted)


ON_META = """
ceilings scan_torch conv_torch kd_fused waits step_time shard_step_time unaligned_products serving decode_step phases
"""


def test_no_check_mixes_devices(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device whatever is made on the CPU and meets the model raises, as it would on a GPU."""
    import registry
    import torch

    checks = registry.all_checks()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    for module in ("stage1_kernels", "stage7_serving"):
        monkeypatch.setattr(f"{module}.difference", lambda found, expected: 0.0)
    for name in ON_META.split():
        line = __import__("checks").report(checks[name], registry.Machine("meta", tiny=True))
        assert line["ok"], line


def test_a_wrong_kernel_fails_its_check() -> None:
    import registry

    registry.all_checks()
    import stage1_kernels as stage

    from nemo_elastic.mcore.kernels.causal_conv import causal_conv1d_fn

    def without_bias(x: Any, weight: Any, bias: Any, **more: Any) -> Any:
        return causal_conv1d_fn(x, weight, 0 * bias, **more)

    with pytest.raises(AssertionError, match="differs by"):
        stage.convolutions(registry.Machine("cpu", tiny=True), without_bias)


def test_a_stack_that_computes_something_else_fails_its_check(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 8 with a stack in Transformer Engine's place: the local one passes, one of other weights does not."""
    import pool_elastic
    import registry

    registry.all_checks()
    import stage8_te as stage

    machine, build = registry.Machine("cpu", tiny=True), pool_elastic.elastic_model
    found = stage.te_against_local(machine)
    assert found.stand_in and set(found.values.values()) == {0.0}

    def another(arch: Any, dtype: Any, *, local: bool) -> Any:
        return build(arch, dtype, seed=0 if local else 1)

    monkeypatch.setattr(pool_elastic, "elastic_model", another)
    with pytest.raises(AssertionError, match="float32 full logits"):
        stage.te_against_local(machine)


def test_a_gpu_without_transformer_engine_says_so_at_once() -> None:
    import registry

    checks = [check for check in registry.all_checks().values() if check.stage == 8]
    for check in checks:
        found = check.run(registry.Machine("cuda"))
        assert found.stand_in and found.values == {"transformer_engine": "not there"}, check.name
    assert len(checks) == 4


@pytest.mark.slow
def test_every_stage_rehearses_on_the_cpu(tmp_path: Path) -> None:
    import registry

    found = run(tmp_path / "out.json")
    checks = registry.all_checks()
    assert [line["check"] for line in found["checks"]] == list(checks)
    assert found["code"] == 0, [line for line in found["checks"] if not line["ok"]] + [found["said"]]
    for line in found["checks"]:
        assert line["stand_in"] or not checks[line["check"]].needs_kernels, line
        if not line["stand_in"]:
            assert set(checks[line["check"]].predicted) <= set(line["values"]) or line["stage"] == 5, line


def test_the_pages_are_current(pages: ModuleType) -> None:
    for path, text in pages.pages().items():
        assert path.read_text() == text, "run `python benchmarks/gpu/pages.py`"


def result(value: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"check": "ceilings", "stage": 0, "ok": True, "stand_in": False, "values": {"gemm_tflops": value}} | more


def written(folder: Path, name: str, line: dict[str, Any], **run: Any) -> None:
    about = {"date": f"2027-01-0{len(list(folder.iterdir())) + 1} 10:00", "device": "cuda", "tiny": False}
    about |= {"gpu": "H100", "commit": "abc123"} | run
    (folder / name).write_text(json.dumps({"run": about, "checks": [line]}))


def test_only_a_gpu_at_full_size_counts(pages: ModuleType, tmp_path: Path) -> None:
    from registry import all_checks

    check = all_checks()["ceilings"]
    written(tmp_path, "a.json", result(), device="cpu")
    written(tmp_path, "b.json", result(), tiny=True)
    written(tmp_path, "c.json", result(stand_in=True))
    results = pages.last_results(tmp_path)
    assert results == {} and pages.outcome(check, results.get("ceilings")) == "never run"
    assert "**None of the 1 checks has ever run on a GPU.**" in pages.page({"ceilings": check}, results)
    written(tmp_path, "d.json", result(750.0))
    written(tmp_path, "e.json", result(stand_in=True))  # later, and still no result
    words = pages.outcome(check, pages.last_results(tmp_path)["ceilings"])
    assert words == "gemm_tflops 750; **not as predicted**: copy_tb_per_s (H100, abc123, 2027-01-04)"
    written(tmp_path, "f.json", {"check": "ceilings", "stage": 0, "ok": False, "error": "cut with its stage"})
    results = pages.last_results(tmp_path)
    assert pages.outcome(check, results["ceilings"]) == "**failed**: cut with its stage (H100, abc123, 2027-01-06)"
    assert "1 ran on a GPU, and 1 of them failed" in pages.page({"ceilings": check}, results)


def test_readme_says_what_ran(pages: ModuleType) -> None:
    from results import Result

    line = result() | {"check": "pipeline_fp32"}
    shown = pages.table({}, {"pipeline_fp32": Result(line, {"gpu": "H100"})})
    assert "| H100: in fp32; else written, never run |" in shown
    failed = pages.table({}, {"pipeline_fp32": Result(line | {"ok": False}, {"gpu": "H100"})})
    assert "H100" not in failed


def test_what_is_pruned_is_gone_and_strange_sources_are_refused() -> None:
    from compile_conv import pruned_binding, pruned_kernel

    text = pruned_kernel(SOURCE)
    assert "if (params.width == 4) {" in text and "width == 2" not in text and "launch<128, 3" not in text
    kept = [line for line in text.splitlines() if line.startswith("template void")]
    assert kept == [f"template void f<{t}, {t}>(Params &params);" for t in ("float", "at::BFloat16")]
    for prune in (pruned_kernel, pruned_binding):
        with pytest.raises(ValueError, match="changed"):
            prune("int main() {}")


def test_a_part_that_cannot_be_built_is_left_out_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import build

    def fine(out: Path, work: Path, arguments: Any) -> None:
        (out / "file").write_text("x")

    monkeypatch.setattr(build, "KIT", tmp_path)
    monkeypatch.setattr(build, "PARTS", {"packages": fine, "conv": build.conv})
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "wheels", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["build.py"])
    assert build.main() == 1
    assert "WITHOUT conv" in capsys.readouterr().out.splitlines()[-1]
    parts = json.loads((tmp_path / "kit.json").read_text())["parts"]
    assert "no nvcc 13.0" in parts["conv"]["left_out"] and parts["packages"]["megabytes"] >= 0
    assert (tmp_path / "packages.tar.xz").is_file() and not (tmp_path / "conv.tar.xz").exists()


def test_every_package_of_the_kit_has_a_pin() -> None:
    import build

    assert set(map(build.normalized, (*build.lacking(), *build.COPIED))) <= set(build.pins())
