"""The paper's experiment at the size of two CPU cores: one command, resumable at any point, a file per run.

    python examples/paper_small/run.py --out runs/paper_small                     # everything: 10 to 15 core-hours
    python examples/paper_small/run.py --out runs/paper_small --groups headline --seeds 4 --jobs 2
    python examples/paper_small/run.py --out runs/paper_small --quick              # a few steps of each: that it runs

Makes the parents (`parent.py`), ranks and sorts them, does every run of `runs.py` that has no file in RESULTS yet (an
interrupted one goes on from its newest checkpoint), and writes docs/results.md from the files (`results.py`). Runs on
another parent than the one whose files are in RESULTS are refused: --results names a folder for a set of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from runs import BASES, GROUPS, PARENTS, RUNS, Run, parent_of
from series import HERE, Series, digest, machine, refuse

from nemo_elastic.files import write_json

RESULTS = HERE / "results"


def quick(run: Run) -> Run:
    """Two steps of every stage."""
    return replace(run, stages=tuple({**stage, "steps": 2, "global_batch_size": 8} for stage in run.stages))


def score_parent(series: Series, parent: int) -> None:
    """The file of a parent: the hash of its weights, and its score.

    Raises:
        SystemExit: there is one already, of another parent.
    """
    file, weights = series.results / f"parent-{parent}.json", series.out / "parents" / str(parent)
    if not file.is_file():
        few = ["--windows", "4", "--each", "1"] if series.quick else []
        score = series.out / "parents" / f"{parent}.score.json"
        series.command("score", "--out", str(series.out), "--weights", str(weights), "--output", str(score), *few)
        found = json.loads(score.read_text(encoding="utf-8"))["parent"]
        write_json(file, {"seed": parent, "sha256": digest(weights), "machine": machine(), "score": found})


def known_parent(series: Series, parent: int) -> str | None:
    """SHA-256 of the parent that the results are of; None: there are none yet.

    Raises:
        SystemExit: there are, and their parent was not kept.
    """
    file = series.results / f"parent-{parent}.json"
    if not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))["sha256"]
    if known is None:
        seeds = ",".join(map(str, PARENTS[parent].seeds))
        refuse(
            f"--seeds {seeds}: the files in {series.results} are of a parent whose weights were not kept, and runs on "
            "another one do not compare with them; --seeds leaves these out, --results FOLDER makes a set of its own"
        )
    return known


def all_runs(series: Series, missing: list[tuple[Run, int]], jobs: int) -> None:
    """These, `jobs` at a time; a run begins when the one whose shapes it takes has its file."""
    futures: dict[tuple[str, int], Future[None]] = {}

    def one(run: Run, seed: int) -> None:
        needed = futures.get((run.shapes_of or "", seed))
        if needed is not None:
            needed.result()
        begin = time.monotonic()
        series.do(quick(run) if series.quick else run, seed)
        done = json.loads(series.file(run.name, seed).read_text(encoding="utf-8"))["score"]
        losses = {name: round(row["heldout_loss"], 4) for name, row in done.items()}
        print(f"{run.name}-{seed}: {time.monotonic() - begin:.0f} s {losses}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for run, seed in missing:
            futures[run.name, seed] = pool.submit(one, run, seed)
        for future in futures.values():
            future.result()


def numbers(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(word) for word in text.split(",")]


def selected(args: argparse.Namespace, words: argparse.ArgumentParser) -> list[tuple[Run, int]]:
    """Runs by name or group, in the order of `runs.py`, each with those of its seeds that were asked for."""
    groups = args.groups.split(",") if args.groups else GROUPS
    only = args.only.split(",") if args.only else [r.name for r in RUNS.values() if r.group in groups]
    unknown = [n for n in only if n not in RUNS] + [g for g in groups if g not in GROUPS]
    if unknown:
        known = f"runs: {', '.join(RUNS)}; groups: {', '.join(GROUPS)}"
        words.error(f"no run or group {', '.join(unknown)}; {known}")
    seeds = [seed for parent in PARENTS.values() for seed in parent.seeds]
    if args.seeds and not set(args.seeds) <= set(seeds):
        words.error(f"--seeds {','.join(map(str, args.seeds))}: must be of {', '.join(map(str, seeds))}")
    found = [
        (run, seed) for seed in args.seeds or seeds for run in RUNS.values() if run.name in only and seed in run.seeds
    ]
    if not found:
        done_with = "; ".join(f"{name}: {', '.join(map(str, RUNS[name].seeds))}" for name in only)
        words.error(f"--seeds {','.join(map(str, args.seeds))}: none of these runs is done with that ({done_with})")
    return found


def prepare(series: Series, missing: list[tuple[Run, int]]) -> None:
    """What these start from: the trained parents with their scores, the untrained one, ranked and sorted."""
    parents = dict.fromkeys(parent_of(seed) for run, seed in missing if BASES[run.base].trained)
    known = {parent: known_parent(series, parent) for parent in parents}
    for run, seed in missing:
        source = RUNS.get(run.shapes_of or "")
        if source and (source, seed) not in missing and not series.file(source.name, seed).is_file():
            refuse(
                f"{run.name}-{seed} takes the shapes of {source.name}-{seed}, which has no file in {series.results}: "
                f"name {source.name} as well"
            )
    with series.alone("parents", wait=True):
        make(series, missing, known)


def make(series: Series, missing: list[tuple[Run, int]], known: Mapping[int, str | None]) -> None:
    """`prepare`, where nothing forbids it.

    Raises:
        SystemExit: a parent is there that is not the known one.
    """
    series.command("parent", "--out", str(series.out), "--initial")
    for parent in known:
        short = ["--steps", "4"] if series.quick else []
        series.command("parent", "--out", str(series.out), "--seed", str(parent), *short)
        found = digest(series.out / "parents" / str(parent))
        if known[parent] not in (None, found):
            refuse(
                f"--out {series.out}: its parent {parent} (SHA-256 {found[:12]}) is not the one of the files in "
                f"{series.results} ({known[parent][:12]}); give another --out, or another --results"
            )
        score_parent(series, parent)
    for run, seed in missing:
        series.prepared(run.base, seed)


def series_of(out: Path, quick: bool, results: Path | None = None) -> Series:
    """The series in a folder; a quick parent is no parent for the rest, so a quick one has a folder of its own."""
    out = out.resolve() / "quick" if quick else out.resolve()
    return Series(out, results or (out / "results" if quick else RESULTS), quick)


def main() -> None:
    """Everything that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="parent, checkpoints and work in progress")
    parser.add_argument("--results", type=Path, help="where the runs' files go; default: results/ here")
    parser.add_argument("--seeds", type=numbers, help="comma separated; default: all that a run is done with")
    parser.add_argument("--groups", help=f"comma separated, of {', '.join(GROUPS)}")
    parser.add_argument("--only", help="names of runs, comma separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="two steps a stage: that it runs, not what it shows")
    args = parser.parse_args()
    series = series_of(args.out, args.quick, args.results)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    missing = [(run, seed) for run, seed in selected(args, parser) if not series.file(run.name, seed).is_file()]
    if missing:
        prepare(series, missing)
        all_runs(series, missing, args.jobs)
    if not args.quick and not args.only:
        docs = ["--docs", str(series.out / "docs")] if args.results else []
        series.command("results", "--results", str(series.results), *docs)


if __name__ == "__main__":
    main()
