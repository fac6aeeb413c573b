"""The reasoning parents of the small reproduction: problems, tokenizer, models trained on them by NeMo.

    python examples/paper_small/parent.py --out runs/paper_small --seed 2

writes OUT/data/problems.jsonl, OUT/data/tokenizer.json, OUT/initial (weights that nothing has trained, for the children
from scratch) and OUT/parents/SEED; the last two are what `parent.path` takes. The tokenizer and parents that stand in
`parents/` here are copied, other parents are trained (20 to 40 minutes). What is there already is not made again; an
interrupted training goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from problems import blend, training_file
from runs import PARENTS

from nemo_elastic.nemo.plain import cpu

HERE = Path(__file__).resolve().parent
KEPT = HERE / "parents"  # tokenizer.json, and a folder for each parent that the results came from
INITIAL_SEED = 1  # of the untrained model, which has the first parent's sizes


def model_of(parent: int) -> dict[str, Any]:
    """The `model` section of a parent; of another seed than theirs: the first one's."""
    config = PARENTS.get(parent, PARENTS[1]).config
    return OmegaConf.to_container(OmegaConf.load(HERE / config).model)


def prepare(folder: Path) -> None:
    """The problems, and a byte-level BPE of them and of the text: the kept one, which the kept parents read."""
    from nemo_elastic.data.corpus import DEFAULT_LIST, load_corpus_list, read_documents, usable_files
    from nemo_elastic.data.tokenizer import train_bpe

    if not (folder / "problems.jsonl").is_file():
        training_file(folder / "problems.jsonl")
    if (folder / "tokenizer.json").is_file():
        return
    if (KEPT / "tokenizer.json").is_file():
        shutil.copyfile(KEPT / "tokenizer.json", folder / "tokenizer.json")
    else:
        lines = (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines[::10]]
        corpus = list(read_documents(usable_files(load_corpus_list(DEFAULT_LIST)), "train"))
        train_bpe(texts + corpus, model_of(1)["vocab_size"]).save(str(folder / "tokenizer.json"))


def save_initial(folder: Path, sizes: dict[str, Any], seed: int) -> None:
    """A model as Megatron initialises it."""
    from nemo_elastic.config.model_fields import architecture_of
    from nemo_elastic.mcore.models.build import build_plain_model
    from nemo_elastic.mcore.runtime.process_groups import start
    from nemo_elastic.nemo.plain.tiny_parent import save_parent

    start(seed=seed)
    torch.manual_seed(seed)
    save_parent(folder, build_plain_model(architecture_of(sizes)), sizes, {"steps": 0, "seed": seed})


def main() -> None:
    """Prepare, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of 2,048 tokens; default: 2200, or the kept parent of this seed")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--initial", action="store_true", help="data and OUT/initial only")
    args = parser.parse_args()
    prepare(args.out / "data")
    cpu.install()  # before the modules below, which build on a settled platform
    if not (args.out / "initial" / "config.json").is_file():
        save_initial(args.out / "initial", model_of(1), INITIAL_SEED)
    kept, folder = KEPT / str(args.seed), args.out / "parents" / str(args.seed)
    if args.initial or (folder / "config.json").is_file():
        return
    if args.steps is None and kept.is_dir():
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    else:
        train(args, model_of(args.seed), folder)


def train(args: argparse.Namespace, sizes: dict[str, Any], folder: Path) -> None:
    """The parent, into `folder`."""
    from nemo_elastic.nemo.plain.data import TextDataModule
    from nemo_elastic.nemo.plain.plain_config import plain_model_config
    from nemo_elastic.nemo.plain.pretrain import PretrainConfig, pretrain
    from nemo_elastic.nemo.plain.tiny_parent import save_parent
    from nemo_elastic.nemo.plain.tokenizer import load_tokenizer

    torch.set_num_threads(args.threads)
    steps = args.steps or 2200
    data = TextDataModule(
        load_tokenizer(str(args.out / "data" / "tokenizer.json")),
        seq_length=sizes["seq_length"],
        micro_batch_size=8,
        global_batch_size=8,
        seed=args.seed,
        blend=blend(args.out / "data"),
    )
    config = PretrainConfig(
        max_steps=steps,
        lr=args.lr,
        warmup_steps=min(200, steps // 10),
        min_lr_ratio=0.02,
        heldout_every_steps=500,
        heldout_batches=16,
        checkpoint_every_steps=500,
        seed=args.seed,
    )
    work = args.out / "parent_runs" / str(args.seed)
    checkpoints = sorted((work / "checkpoints").glob("step=*"), key=lambda p: p.stat().st_mtime)
    module, facts = pretrain(
        plain_model_config(sizes), data, config, work, resume_from=checkpoints[-1] if checkpoints else None
    )
    save_parent(folder, module, sizes, facts | {"seed": args.seed, "lr": args.lr})


if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    main()
