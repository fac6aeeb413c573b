"""Result files of the GPU checks: one JSON file a run, of the lines that its stages left.

    python benchmarks/gpu/results.py limits                        # stage and seconds, for run.sh
    python benchmarks/gpu/results.py collect LINES... --stages 0,1,2 --output FILE --device cuda

A check of a stage that ran and left no line was cut with its stage: it gets a line that says so. Results that count are
runs on a GPU at full size; a stand-in never counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from registry import CPU_PATIENCE, ROOT, STAGES, Check, all_checks, paths_of_the_tree

FOLDER = Path(__file__).resolve().parent / "results"
NAMED = ("torch", "triton", "megatron-core", "nemo-toolkit", "transformers", "numpy")


def collected(lines: Iterable[str], checks: Mapping[str, Check], stages: Sequence[int]) -> list[dict[str, Any]]:
    """Lines as they were printed, and one for each check of `stages` that left none."""
    found = {line["check"]: line for line in map(json.loads, lines)}
    for check in checks.values():
        if check.stage in stages and check.name not in found:
            found[check.name] = {"check": check.name, "stage": check.stage, "ok": False, "error": "cut with its stage"}
    return sorted(found.values(), key=lambda line: list(checks).index(line["check"]))


def about_the_run(device: str, tiny: bool) -> dict[str, Any]:
    """Machine, versions and commit."""
    about: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "device": device, "tiny": tiny}
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        about["gpu"] = _said(command).partition("\n")[0] or "unknown"
    about |= {"commit": os.environ.get("GPU_CHECKS_COMMIT") or _said(["git", "-C", str(ROOT), "describe", "--always",
              "--dirty", "--abbrev=10"]) or "unknown", "python": platform.python_version()}  # fmt: skip
    for name in NAMED:
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            continue
    kit = ROOT / ".gpu_kit" / "kit.json"
    return about | ({"kit": json.loads(kit.read_text())["parts"]} if kit.is_file() else {})


def _said(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Result(NamedTuple):
    """The last line of a check that counts, and the run it is of."""

    line: Mapping[str, Any]
    run: Mapping[str, Any]


def last_results(folder: Path = FOLDER) -> dict[str, Result]:
    """Check -> its last result on a GPU, at full size, of the thing itself."""
    found: dict[str, Result] = {}
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    for run in sorted(runs, key=lambda run: run["run"]["date"]):
        if run["run"]["device"] != "cuda" or run["run"]["tiny"]:
            continue
        found |= {line["check"]: Result(line, run["run"]) for line in run["checks"] if not line.get("stand_in")}
    return found


def main() -> int:
    """`collect` leaves with 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("limits", "collect"))
    parser.add_argument("lines", nargs="*", type=Path)
    parser.add_argument("--stages", default="", type=lambda text: [int(n) for n in text.split(",") if n])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if arguments.verb == "limits":
        patience = 1 if arguments.device == "cuda" else CPU_PATIENCE
        print("\n".join(f"{stage} {patience * seconds}" for stage, (_, seconds) in STAGES.items()))
        return 0
    paths_of_the_tree()
    from nemo_elastic.files import write_json

    lines = [line for path in arguments.lines if path.is_file() for line in path.read_text().splitlines() if line]
    checks = collected(lines, all_checks(arguments.folder), arguments.stages)
    for line in checks:
        verdict = "ok" if line["ok"] else "FAILED"
        words = f"{verdict}{' (stand-in)' if line.get('stand_in') else ''} {line.get('error', '')}"
        print(f"{line['stage']} {line['check']:24} {line.get('seconds', 0):7.1f} s  {words[:160]}")
    write_json(arguments.output, {"run": about_the_run(arguments.device, arguments.tiny), "checks": checks})
    print(arguments.output)
    return int(not all(line["ok"] for line in checks))


if __name__ == "__main__":
    raise SystemExit(main())
