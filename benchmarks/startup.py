"""Cold starts as real processes: verbs that need no torch, and the first training step against plain NeMo's.

    python benchmarks/startup.py [--quick] [--repetitions 5] [--output FILE]

`pass` is an interpreter that does nothing, `import torch` what a tool that needs torch cannot beat. `plan` and `config`
read the 12B parent's configuration. Wall and CPU seconds of whole processes, in turn, medians; ratios are of wall
time, with `cpu` of CPU time. A first round does not count, so files come from the system's cache. The limit is
`plan`'s, in seconds.

`first_step` is from the process's start to the end of the first training step of the parent that ships: `train` after
ranking and sorting (elastic model, router, teacher, zero-shot validation of three budgets on 4 windows) against a
script that builds a plain `llm.MambaModel` of the same sizes and NeMo's trainer, on the same text. `trainer` is that
script until the trainer is built: what importing NeMo costs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, Seconds, finish, interleaved, median, parser, process, start
from training_runs import CONFIG, nemo_elastic, prepared, rank_words, ranked, watched

LIMIT_PLAN_S = 2.0
PARENT = "nemotron_nano_12b_v2.yaml"
VERB = (sys.executable, "-m", "nemo_elastic")
COMMANDS = {
    "pass": (sys.executable, "-c", "pass"),
    "import torch": (sys.executable, "-W", "ignore", "-c", "import torch"),
    "help": (*VERB, "--help"),
    "config": (*VERB, "config", "--config", PARENT),
    "plan": (*VERB, "plan", "--config", PARENT),
}
TRAIN = ("train.stages=[{steps: 2, global_batch_size: 8}]", "train.val_every_steps=2", "train.val_samples=4")


def plain_nemo(out: Path) -> None:
    """NeMo's trainer on a plain model; writes a line to OUT/marks when the trainer is built and after each step."""
    import lightning.pytorch as pl
    from nemo.collections import llm

    from nemo_elastic.config import load_config
    from nemo_elastic.nemo.plain.plain_config import plain_model_config
    from nemo_elastic.nemo.plain.trainer import build_optimizer, build_trainer
    from nemo_elastic.nemo.run.train import data_module

    def mark() -> None:
        with (out / "marks").open("a", encoding="utf-8") as file:
            file.write("done\n")

    class Marks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            mark()

    run = load_config(CONFIG, TRAIN).config
    data, batch = data_module(run), {"micro_batch_size": run.train.micro_batch_size, "global_batch_size": 8}
    trainer = build_trainer(out, max_steps=2, checkpoint_every=2, callbacks=[Marks()], **batch)
    model = llm.MambaModel(plain_model_config(run.model), optim=build_optimizer(1e-3), tokenizer=data.tokenizer)
    mark()
    trainer.fit(model, data)


def cold_starts(repetitions: int) -> dict[str, Any]:
    """Whole processes."""

    def started(name: str) -> Seconds:
        with tempfile.TemporaryFile() as nowhere:
            return process(COMMANDS[name], cwd=ROOT, stdout=nowhere)

    runs = {name: (lambda n=name: started(n)) for name in COMMANDS}
    found = interleaved(runs, repetitions, measure=lambda run: run())
    middle = {name: median(times) for name, times in found.items()}
    return {
        "seconds_of": {name: {"wall_s": round(m.wall, 3), "cpu_s": round(m.cpu, 3)} for name, m in middle.items()},
        "ratios": {
            name: {
                "to_pass": round(middle[name].wall / middle["pass"].wall, 3),
                "to_import_torch": round(middle[name].wall / middle["import torch"].wall, 3),
                "cpu_to_import_torch": round(middle[name].cpu / middle["import torch"].cpu, 3),
            }
            for name in ("help", "config", "plan")
        },
    }


def first_steps(repetitions: int, quick: bool) -> dict[str, Any]:
    """Seconds to the first step, ours and plain NeMo's."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = ranked(Path(folder), quick), Path(folder) / "run"

        def ours() -> dict[str, Seconds]:
            return {"train": nemo_elastic("train", prepared(base, out), (*TRAIN, *rank_words(quick)))[0]}

        def plain() -> dict[str, Seconds]:
            where = Path(folder) / "plain"
            shutil.rmtree(where, ignore_errors=True)
            command = [sys.executable, __file__, "--plain", str(where)]
            trainer, first, *_ = watched(command, where / "log", where / "marks")
            return {"plain": first, "trainer": trainer}

        found: dict[str, list[Seconds]] = {}
        runs = interleaved({"ours": ours, "plain": plain}, repetitions, warm_up=False, measure=lambda run: run())
        for taken in (*runs["ours"], *runs["plain"]):
            for name, seconds in taken.items():
                found.setdefault(name, []).append(seconds)
    pairs = {
        name: [
            Seconds(*(a / b for a, b in zip(*pair, strict=True)))
            for pair in zip(found["train"], found[name], strict=True)
        ]
        for name in ("plain", "trainer")
    }
    middle = {name: median(times) for name, times in found.items()}
    return {
        **{name: {"wall_s": round(m.wall, 2), "cpu_s": round(m.cpu, 2)} for name, m in middle.items()},
        "train_to_plain_ratio": round(median(pairs["plain"]).wall, 3),
        "train_to_plain_cpu_ratio": round(median(pairs["plain"]).cpu, 3),
        "train_to_trainer_ratio": round(median(pairs["trainer"]).wall, 3),
    }


def main() -> int:
    """Start processes, compare."""
    words = parser(__doc__, quick="everything once: that it runs", repetitions=5, threads=None)
    words.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = start(words)
    if arguments.plain:
        plain_nemo(arguments.plain)
        return 0
    result = cold_starts(arguments.repetitions)
    plan = result["seconds_of"]["plan"]["wall_s"]
    limits = {"plan_s": plan, "met": plan <= LIMIT_PLAN_S, "limits": {"plan_s": LIMIT_PLAN_S}}
    first = first_steps(max(1, arguments.repetitions // 2), arguments.quick)
    return finish(arguments, {**limits, **result, "first_step": first})


if __name__ == "__main__":
    raise SystemExit(main())
