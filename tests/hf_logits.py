"""Logits of Hugging Face folders under transformers 5, in a Python of its own; see test_hf.py and test_trained.py.

    .venv-hf/bin/python tests/hf_logits.py TOKENS.json OUT.npz FOLDER...

Fails on missing, unexpected or misshapen weights. Arrays of folder N: `N`, the logits of all tokens; `shortL.N`, of the
first L; of long text also `cachedN`, of tokens 100 to 140, one by one through the cache, behind a hundred at once.
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main(tokens: str, out: str, *folders: str) -> None:
    torch.set_num_threads(1)
    with open(tokens) as file:
        ids = torch.tensor(json.load(file))
    found = {}
    for number, folder in enumerate(folders):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        problems = {name: list(value) for name, value in loading.items() if len(value)}
        assert not problems, problems
        assert type(model).__module__.startswith("transformers.models.nemotron_h"), type(model)
        config = AutoConfig.from_pretrained(folder)
        assert config.num_hidden_layers == len(model.model.layers)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert tokenizer.decode(tokenizer("def f(x): return x")["input_ids"]) == "def f(x): return x"
        with torch.no_grad():
            found[str(number)] = model(input_ids=ids, use_cache=False).logits.numpy()
            for length in (1, 2, 5):
                found[f"short{length}.{number}"] = model(input_ids=ids[:, :length], use_cache=False).logits.numpy()
            if ids.shape[1] > 140:
                cache = model(input_ids=ids[:, :100], use_cache=True).past_key_values
                steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(100, 140)]
                found[f"cached{number}"] = torch.cat(steps, dim=1).numpy()
        found[f"parameters{number}"] = np.array(sum(p.numel() for p in model.parameters()))
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
