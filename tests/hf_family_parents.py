"""Tiny random parents of every family by transformers' own classes, in a Python of its own; see test_hf_families.py.

    .venv-hf/bin/python tests/hf_family_parents.py CONFIGS.json OUT

CONFIGS: name -> config.json. OUT/NAME is the saved folder, OUT/NAME.safetensors has its `logits` of `tokens`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


def main(configs: str, out: str) -> None:
    torch.set_num_threads(1)
    for name, config in json.loads(Path(configs).read_text()).items():
        said = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        model = AutoModelForCausalLM.from_config(said, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if value.dim() < 2 else 0.2))
                if "norm" in key.split(".")[-2]:
                    value += 1
                if key.endswith("A_log"):
                    value.abs_()
            for key, value in model.named_buffers():
                if key.endswith("e_score_correction_bias"):  # favours the last experts: those that children drop
                    own = torch.randn(value.shape, generator=generator) * 0.1
                    value.copy_(own + torch.linspace(0, 0.5, len(value)))
        model.save_pretrained(Path(out) / name)
        tokens = torch.randint(0, said.vocab_size, (2, 40), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        save_file({"tokens": tokens, "logits": logits.contiguous()}, Path(out) / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
