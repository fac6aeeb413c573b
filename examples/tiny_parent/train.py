"""Make a tiny parent that ships in `nemo_elastic/assets`, from the text of the running Python.

    python examples/tiny_parent/train.py --assets my_parent --out runs/tiny_parent --max-minutes 75
    python examples/tiny_parent/train.py --assets my_parent --out runs/tiny_parent --max-steps 5000
    python examples/tiny_parent/train.py --parent tiny_experts --assets my_experts --max-minutes 40 --threads 1

Corpus list and tokenizer are made too when `--assets` lacks them, but for `tiny_experts`, which takes those of the
package. About every ten minutes, and at the end, weights, config and card are written to `--assets`. `--resume` goes on
from the newest checkpoint of `--out`.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.nemo.plain import cpu

MODELS = {
    "tiny_parent": {
        "hybrid_override_pattern": "M-M-M*-M-M-M*-M-",
        "hidden_size": 128,
        "ffn_hidden_size": 512,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "kv_channels": 16,
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "mamba_num_groups": 4,
        "mamba_state_dim": 32,
        "vocab_size": 2048,
        "seq_length": 256,
    },
    "tiny_experts": {
        "hybrid_override_pattern": "MEM*EMEMEM*E",
        "hidden_size": 96,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 64,
        "moe_shared_expert_intermediate_size": 96,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 16,
        "mamba_num_heads": 12,
        "mamba_head_dim": 16,
        "mamba_num_groups": 2,
        "mamba_state_dim": 32,
        "vocab_size": 2048,
        "seq_length": 256,
    },
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", choices=MODELS, default="tiny_parent", help="which one")
    parser.add_argument("--assets", type=Path, required=True, help="folder of the files that ship")
    parser.add_argument("--out", type=Path, help="checkpoints and logs; default: runs/PARENT")
    parser.add_argument("--max-minutes", type=float, help="end after so many minutes; the learning rate follows")
    parser.add_argument("--max-steps", type=int, default=1_000_000, help="end after so many steps")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--heldout-every-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per step")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="samples per forward")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.max_minutes is None and args.max_steps == 1_000_000:
        parser.error("give --max-minutes or --max-steps")
    args.out = args.out or Path("runs") / args.parent
    return args


def main() -> None:
    """Prepare text and tokenizer, train, export."""
    args = arguments()
    cpu.install()  # before the modules below, which build on a settled platform

    import nemo

    from nemo_elastic.data.corpus import (
        DEFAULT_LIST,
        load_corpus_list,
        read_documents,
        scan_standard_library,
        usable_files,
    )
    from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER, train_bpe
    from nemo_elastic.mcore.versions import installed
    from nemo_elastic.nemo.plain.data import TextDataModule
    from nemo_elastic.nemo.plain.plain_config import plain_model_config
    from nemo_elastic.nemo.plain.pretrain import PretrainConfig, pretrain
    from nemo_elastic.nemo.plain.tiny_parent import bf16_weights, expert_load, heldout_loss, save_card, save_parent
    from nemo_elastic.nemo.plain.tokenizer import load_tokenizer

    torch.set_num_threads(args.threads)
    args.assets.mkdir(parents=True, exist_ok=True)
    model = MODELS[args.parent]
    corpus_file, tokenizer_file = args.assets / "corpus.json", args.assets / "tokenizer.json"
    if args.parent == "tiny_experts":
        corpus_file, tokenizer_file = DEFAULT_LIST, DEFAULT_TOKENIZER
    if not corpus_file.is_file():
        scan_standard_library().save(corpus_file)
    corpus = load_corpus_list(corpus_file)
    if not tokenizer_file.is_file():
        train_bpe(read_documents(usable_files(corpus), "train"), model["vocab_size"]).save(str(tokenizer_file))

    data = TextDataModule(
        load_tokenizer(str(tokenizer_file)),
        seq_length=model["seq_length"],
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.batch_size,
        seed=args.seed,
        corpus_list=str(corpus_file),
    )
    config = PretrainConfig(
        max_steps=args.max_steps,
        max_minutes=args.max_minutes,
        lr=args.lr,
        warmup_steps=args.warmup_steps,
        heldout_every_steps=args.heldout_every_steps,
        seed=args.seed,
    )
    tokens = {split: len(data.windows(split).stream) for split in ("train", "heldout")}
    words = [word for word in sys.argv[1:] if word != "--resume"]
    command = "python examples/tiny_parent/train.py " + shlex.join(words)

    def export(module: torch.nn.Module, run: dict[str, Any]) -> None:
        with expert_load(module) as load:
            loss = heldout_loss(module, data.windows("heldout"), args.batch_size)
        facts = {
            **run,
            "heldout_loss": round(loss, 5),
            **({"expert_load": load, "bias_update_rate": module.config.moe_router_bias_update_rate} if load else {}),
            "parameters": sum(math.prod(w.shape) for w in bf16_weights(module).values()),
            "global_batch_size": args.batch_size,
            "lr": args.lr,
            "warmup_steps": args.warmup_steps,
            "min_lr_ratio": config.min_lr_ratio,
            "seed": args.seed,
            "threads": args.threads,
            "corpus_python": corpus.python,
            "megatron_core": installed(),
            "nemo": nemo.__version__,
        }
        digest = save_parent(args.assets, module, model, facts)
        save_card(args.assets, sizes=model, facts=facts, corpus=corpus, tokens=tokens, sha256=digest, command=command)
        logging.getLogger(__name__).info("exported %s", facts)

    checkpoints = sorted((args.out / "checkpoints").glob("step=*"), key=lambda p: p.stat().st_mtime)
    if args.resume and not checkpoints:
        sys.exit(f"--resume: no checkpoint in {args.out / 'checkpoints'}; start without it")
    module, run = pretrain(
        plain_model_config(model),
        data,
        config,
        args.out,
        export=export,
        resume_from=checkpoints[-1] if args.resume else None,
    )
    export(module, run)


if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    main()
