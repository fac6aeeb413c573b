"""The data module inside NeMo: who reads which sample, and that a resumed run reads on where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_elastic.data.tokenizer import BPETokenizer

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow  # imports NeMo in processes of its own


def run(out: Path, text: Path, *more: str) -> list[dict]:
    program = Path(__file__).parent / "resumed_text.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parent.parent)}
    command = [sys.executable, str(program), str(out), str(text), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]


def blend_of(folder: Path, text: Path) -> list[dict]:
    """Megatron's ids, text and conversations, 50 : 30 : 20."""
    import test_sources

    test_sources.write_pair(folder / "pair", test_sources.documents())
    lines = [json.dumps({"prompt": f"{i} squared is ", "completion": str(i * i)}) for i in range(80)]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return [
        {"path": str(folder / "pair"), "weight": 50},
        {"path": str(text), "weight": 30},
        {"path": str(folder / "chat.jsonl"), "weight": 20},
    ]


@pytest.mark.parametrize("kind", ["text", "blend"])
def test_resumed_run_reads_on_and_its_checkpoint_carries_the_tokenizer(tmp_path: Path, kind: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i % 97} and {i**3 % 89}\n" for i in range(6000)))
    more = ["--blend", json.dumps(blend_of(tmp_path, text))] if kind == "blend" else []
    whole = run(tmp_path / "whole", text, *more)
    half, _ = sorted((tmp_path / "whole" / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime)
    resumed = run(tmp_path / "resumed", text, "--resume", str(half), *more)

    losses = {r["step"]: r["train_loss"] for r in whole if "train_loss" in r}
    again = {r["step"]: r["train_loss"] for r in resumed if "train_loss" in r}
    assert sorted(losses) == [1, 2, 3, 4] and sorted(again) == [3, 4]
    assert len({round(v, 4) for v in losses.values()}) == 4
    assert [again[s] for s in (3, 4)] == pytest.approx([losses[s] for s in (3, 4)], rel=1e-6)

    heldout = [next(r["heldout_loss"] for r in records if "heldout_loss" in r) for records in (whole, resumed)]
    assert heldout[1] == pytest.approx(heldout[0], rel=1e-6)
    facts = json.loads((tmp_path / "whole" / "facts.json").read_text())
    assert (facts["steps"], facts["tokens"], facts["budget_used"]) == (4, 4 * 4 * 32, 1.0)
    carried = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
    assert carried["ids"] == BPETokenizer().encode("def f(x): return 12")
    assert Path(carried["file"]).is_relative_to(tmp_path / "whole")


def test_a_checkpoint_does_not_go_on_with_another_text(tmp_path: Path) -> None:
    from nemo_elastic.nemo.plain.data import TextDataModule
    from nemo_elastic.nemo.plain.tokenizer import load_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i % 97} and {i**3 % 89}\n" for i in range(3000)))
    blend = blend_of(tmp_path, text)

    def module(**change: object) -> TextDataModule:
        settings = {"seq_length": 32, "blend": blend, "seed": 3, "cache_dir": str(tmp_path / "cache")}
        made = TextDataModule(load_tokenizer(), **(settings | change))
        made.trainer = SimpleNamespace(global_step=2)
        return made

    data = module()
    data.data_sampler.init_global_step = 0
    state = data.state_dict()
    module().load_state_dict(state)
    for change, told in (
        ({"blend": blend[:2]}, r"data\.blend=.* differs from the checkpoint's"),
        ({"blend": [*blend[:2], blend[2] | {"weight": 21}]}, r"data\.blend=.* differs from the checkpoint's"),
        ({"seed": 4}, r"train\.seed=4 differs from the checkpoint's 3"),
        ({"seq_length": 64}, r"train\.stages differs from the checkpoint's in its first 2 steps"),
    ):
        with pytest.raises(ValueError, match=told):
            module(**change).load_state_dict(state)


def test_data_parallel_ranks_share_out_the_same_global_batch() -> None:
    import torch
    from nemo.lightning.data import add_megatron_sampler
    from torch.utils.data import DataLoader

    def batches(rank: int, size: int, consumed: int) -> list[list[int]]:
        loader = DataLoader(torch.arange(48))
        loader = add_megatron_sampler(
            loader, micro_batch_size=2, global_batch_size=8, consumed_samples=consumed, rank=rank, world_size=size
        )
        return [b.tolist() for b in loader]

    alone = batches(0, 1, 0)
    ranks = [batches(rank, 2, 0) for rank in (0, 1)]
    together = [ranks[rank][k] for k in range(12) for rank in (0, 1)]
    assert together == alone == [[2 * k, 2 * k + 1] for k in range(24)]
    assert batches(1, 2, 16) == ranks[1][4:]


def test_data_parallel_ranks_cover_exactly_the_global_batches_of_a_blend(tmp_path: Path) -> None:
    from nemo.lightning.data import add_megatron_sampler
    from torch.utils.data import DataLoader

    from nemo_elastic.nemo.plain.data import TextDataModule, WindowDataset
    from nemo_elastic.nemo.plain.tokenizer import load_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i % 97} and {i**3 % 89}\n" for i in range(3000)))
    data = TextDataModule(
        load_tokenizer(), seq_length=32, blend=blend_of(tmp_path, text), cache_dir=str(tmp_path / "cache")
    )
    windows = data.windows("train")

    def batches(rank: int, size: int, consumed: int) -> list[dict]:
        loader = DataLoader(WindowDataset(windows, 40))
        loader = add_megatron_sampler(
            loader, micro_batch_size=2, global_batch_size=8, consumed_samples=consumed, rank=rank, world_size=size
        )
        return list(loader)

    ranks = [batches(rank, 2, 0) for rank in (0, 1)]
    together = [ranks[rank][k] for k in range(10) for rank in (0, 1)]
    for step in range(5):
        rows = [row for batch in together[4 * step : 4 * step + 4] for row in range(2)]
        assert len(rows) == 8
        for i in range(8):
            tokens, labels, *mask = windows.sample(8 * step + i)
            batch, row = together[4 * step + i // 2], i % 2
            assert batch["tokens"][row].tolist() == tokens.tolist()
            assert batch["labels"][row].tolist() == labels.tolist()
            assert batch["loss_mask"][row].tolist() == (mask[0].tolist() if mask else [1.0] * 32)
    assert sum(len(windows.sample(i)) == 3 for i in range(40)) == 8  # 20 % conversations, with a mask
    resumed = batches(1, 2, 16)
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(resumed, ranks[1][4:], strict=True))
