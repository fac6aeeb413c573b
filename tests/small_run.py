"""Elastic runs of seconds, each in a process of its own that can be killed: a server imports NeMo once and forks.

    server = Server(folder)                      # a process of this file
    pids = server.start(out, "key=value", resume=True, poison={"step": 3, "layer": 5})
    server.start(out, slow={"writer": 1.0, "deletion": 1.0})   # a moment in which to strike
    server.wait(pids) -> exit codes (negative: the signal)

Every run goes through the command line's `main`, as a user's does. `python` may be of another line of Megatron-core.
"""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = """
name: small_run
parent: {{path: {folder}/parent.safetensors}}
data: {{tokenizer: {tokenizer}, paths: [{folder}/text.txt], cache_dir: {folder}/cache}}
model: {model}
elastic:
  ffn_groups: 8
  dims:
    hidden_size: {{choices: [1.0, 0.75, 0.5]}}
    ffn_hidden_size: {{choices: [1.0, 0.75, 0.5]}}
    mamba_num_heads: {{choices: [1.0, 0.5], per_layer: true}}
    num_layers: {{choices: [8, 7, 6]}}
  budgets: {{full: 1.0, large: 0.8, small: 0.6}}
rank: {{samples: 8, depth_samples: 2, seq_length: 32}}
router: {{shapes: learned, hidden_size: 16, warmup_fraction: 0.2, soft_fraction: 0.3, freeze_fraction: 0.2,
  tolerance: 0.1}}
train:
  micro_batch_size: 2
  optimizer: {{lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}}
  stages: [{{steps: {steps}, seq_length: 32, global_batch_size: 8}}]
  log_every_steps: 3
  val_every_steps: 6
  val_samples: 4
  save_every_steps: 4
"""


def write_run(folder: Path, steps: int = 16, **model: Any) -> Path:
    """A random parent, a text and a configuration; `model`: other fields than `checkpoint_family`'s."""
    from checkpoint_family import MODEL, TOKENIZER, random_weights
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = MODEL | {"seq_length": 32} | model
    save_file(random_weights(sizes), folder / "parent.safetensors")
    (folder / "text.txt").write_text("".join(f"line {i} says {i * i % 97} and {i**3 % 89}\n" for i in range(6000)))
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, tokenizer=TOKENIZER, model=json.dumps(sizes), steps=steps))
    return config


class Server:
    """The forking process; see the module."""

    def __init__(self, folder: Path, steps: int = 16, python: str = sys.executable, **model: Any) -> None:
        self.folder, self.config = folder, write_run(folder, steps, **model)
        root = Path(__file__).resolve().parent
        path = os.pathsep.join(map(str, (root.parent, root)))
        # Megatron leaves its choice of attention in the environment of the tests that ran before.
        own = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
        environment = own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        assert line, "the server died"
        return json.loads(line)

    def _ask(self, **message: Any) -> Any:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(
        self, out: Path, *overrides: str, resume: bool = False, size: int = 1, flags: Sequence[str] = (), **more: Any
    ) -> list[int]:
        """Start a run of `size` processes; its log is `out.log`."""
        words = ["train", "--config", str(self.config), "--out", str(out), *overrides, *(["--resume"] * resume), *flags]
        return self._ask(start=words, log=f"{out}.log", size=size, **more)

    def call(self, *words: object, log: Path, module: str = "nemo_elastic.cli.main") -> str:
        """What `main` of a module says, called with `words` in a process of its own that ends well."""
        codes = self.wait(self._ask(start=list(map(str, words)), log=str(log), size=1, module=module))
        text = log.read_text()
        assert codes == [0], text[-6000:]
        return text

    def wait(self, pids: Sequence[int], timeout: float = 240.0) -> list[int]:
        """Exit codes, in order; processes that outlive `timeout` are killed and the call fails."""
        codes = self._ask(wait=list(pids), timeout=timeout)
        assert None not in codes, f"no end within {timeout} s: {codes}"
        return codes

    def run(self, out: Path, *overrides: str, codes: Sequence[int] = (0,), **how: Any) -> str:
        """Start, wait, check; the log."""
        found = self.wait(self.start(out, *overrides, **how))
        text = Path(f"{out}.log").read_text()
        assert found == list(codes) * (len(found) // len(codes)), text[-6000:]
        return text

    def ranked(self, name: str) -> Path:
        """A new run folder that has the undisturbed run's ranking and sorted parent."""
        for part in ("importance", "sorted"):
            shutil.copytree(self.folder / "whole" / part, self.folder / name / part)
        return self.folder / name

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(120)


def helpers_of(pids: Sequence[int], seconds: float = 3.0) -> list[int]:
    """Processes that those of `pids` have started and that live on, once they had `seconds` to end."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                state, _, _, group = entry.read_text().rsplit(")", 1)[1].split()[:4]
                found += [int(entry.parent.name)] * (state != "Z" and int(group) in pids)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """What a run logged."""
    from nemo_elastic.processes.runlog import RunLog

    return RunLog(out / "logs").read(kind)


def difference(one: Path, other: Path) -> list[str]:
    """Names of tensors (weights, router, optimizer) that are not bit-equal in two torch_dist folders."""
    import torch

    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    with TorchDistReader(one) as left, TorchDistReader(other) as right:
        assert set(left.names()) == set(right.names()) and set(left.other_keys()) == set(right.other_keys())
        weights = [n for n in left.names() if not torch.equal(left.read(n), right.read(n))]
        others = [k for k in left.other_keys() if not torch.equal(left.read_key(k), right.read_key(k))]
        assert left.names()
        return [*weights, *others]


def callbacks(poison: dict[str, Any] | None, signal_at: int | None) -> list[Any]:
    """What is done to a run from inside."""
    import lightning.pytorch as pl
    import torch

    from nemo_elastic.mcore.models.build import unwrapped

    class Poison(pl.Callback):
        """Before step `step` (from 1) a weight of a layer becomes NaN, or its gradient does after the backward."""

        def touch(self, trainer: Any, module: Any, kind: str) -> None:
            if trainer.global_step + 1 != poison["step"] or poison.get("kind", "weight") != kind:
                return
            for layer in unwrapped(module.module).decoder.layers:
                if layer.layer_number - 1 == poison["layer"]:
                    p = next(p for p in layer.parameters() if p.dim() == 2)
                    with torch.no_grad():
                        (p if kind == "weight" else p.main_grad)[0, 0] = poison.get("value", float("nan"))

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.touch(trainer, module, "weight")

        def on_megatron_microbatches_end(self, step: Any, **_: Any) -> None:
            self.touch(step.trainer, step.pl_module, "gradient")

    class Terminate(pl.Callback):
        """SIGTERM to this process before a step (from 1), as torchrun sends it to every worker."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step + 1 == signal_at:
                os.kill(os.getpid(), 15)

    return ([Poison()] if poison else []) + ([Terminate()] if signal_at else [])


def slow_down(writer: float = 0.0, deletion: float = 0.0) -> None:
    """Seconds that a save stays open, half of them behind the writing, and that half a checkpoint lies there."""
    from nemo_elastic.mcore.versions import checkpoint_writing
    from nemo_elastic.nemo.run import kept_checkpoints

    megatrons, delete = checkpoint_writing().FileSystemWriterAsync, shutil.rmtree
    write = megatrons.write_preloaded_data

    def write_late(*arguments: Any, **keywords: Any) -> None:
        time.sleep(writer / 2)
        write(*arguments, **keywords)
        time.sleep(writer / 2)  # behind the files, before Megatron's caller learns of them

    def delete_late(path: Path) -> None:
        next(path.rglob("*.distcp")).unlink()
        time.sleep(deletion)
        delete(path)

    megatrons.write_preloaded_data = staticmethod(write_late)
    kept_checkpoints.shutil = types.SimpleNamespace(rmtree=delete_late)


def _child(message: dict[str, Any], rank: int, meeting: dict[str, str]) -> int:
    os.setsid()  # a group of its own, as launchers make it
    log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | (os.O_APPEND if rank else os.O_TRUNC), 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        meeting,
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(message["size"]), LOCAL_WORLD_SIZE=str(message["size"]),
    )  # fmt: skip
    os.environ.update(message.get("environment", {}))
    if "slow" in message:
        slow_down(**message["slow"])
    main = importlib.import_module(message.get("module", "nemo_elastic.cli.main")).main
    from nemo_elastic.nemo.run import train

    stock, more = train.build_trainer, callbacks(message.get("poison"), message.get("signal_at"))

    def build(*arguments: Any, **keywords: Any) -> Any:
        return stock(*arguments, **(keywords | {"callbacks": [*keywords["callbacks"], *more]}))

    train.build_trainer = build
    return main(message["start"])


def _wait(pids: Sequence[int], timeout: float) -> list[int | None]:
    codes: dict[int, int | None] = dict.fromkeys(pids)
    deadline = time.monotonic() + timeout
    while None in codes.values() and time.monotonic() < deadline:
        for pid in [p for p, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in [p for p, code in codes.items() if code is None]:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return list(codes.values())


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from worker_pool import open_store

    torch.set_num_threads(1)
    import nemo_elastic.nemo.pipeline  # noqa: F401  what takes the time, once

    print(json.dumps("ready"), file=answers, flush=True)
    stores = []
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            print(json.dumps(_wait(message["wait"], message["timeout"])), file=answers, flush=True)
            continue
        pids, (store, meeting) = [], open_store()
        stores.append(store)  # those who meet there may outlive the next message
        for rank in range(message["size"]):
            pid = os.fork()
            if not pid:
                code = 70
                try:
                    code = _child(message, rank, meeting)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)


if __name__ == "__main__":
    serve()
