"""Four steps of a very small model on a user's text, whole or resumed after two. Run by `test_nemo_data.py`.

Writes `OUT/progress.jsonl` (loss of every step), `OUT/facts.json`, and the text of the tokenizer that a checkpoint
carries to `OUT/tokenizer.json`.
"""

import argparse
import json
from pathlib import Path

import torch

from nemo_elastic.nemo.plain import cpu

SIZES = {
    "hybrid_override_pattern": "M-*",
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": 8,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_state_dim": 8,
    "vocab_size": 2048,
    "seq_length": 32,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--blend", type=json.loads, default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu.install()
    from nemo.lightning import io

    from nemo_elastic.nemo.plain.data import TextDataModule
    from nemo_elastic.nemo.plain.plain_config import plain_model_config
    from nemo_elastic.nemo.plain.pretrain import PretrainConfig, pretrain
    from nemo_elastic.nemo.plain.tokenizer import load_tokenizer

    data = TextDataModule(
        load_tokenizer(),
        seq_length=SIZES["seq_length"],
        micro_batch_size=2,
        global_batch_size=4,
        paths=[] if arguments.blend else [str(arguments.text)],
        blend=arguments.blend,
        cache_dir=str(arguments.text.parent / "cache"),
    )
    config = PretrainConfig(max_steps=4, warmup_steps=1, log_every_steps=1, checkpoint_every_steps=2)
    model = plain_model_config(SIZES)
    _, facts = pretrain(model, data, config, arguments.out, resume_from=arguments.resume)
    (arguments.out / "facts.json").write_text(json.dumps(facts))
    newest = max((arguments.out / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime)
    carried = io.load_context(newest / "context", subpath="model.tokenizer")
    (arguments.out / "tokenizer.json").write_text(
        json.dumps({"file": carried.tokenizer_file, "ids": carried.text_to_ids("def f(x): return 12")})
    )


if __name__ == "__main__":
    main()
