"""A Hugging Face folder in vLLM, in a Python of its own; see test_vllm.py.

    .venv-vllm/bin/python tests/vllm_logprobs.py REQUEST.json ANSWER.json

REQUEST: `folder`; `intermediate_size`, a list for the MLP layers or null (config.json's); `rows`, tokens; `prompts`,
texts; `new_tokens`. ANSWER: `version`; per row `log_probabilities` of its tokens given those before, and `best`, the
likeliest one there; per prompt `prompts`, its tokens by the folder's own tokenizer, and `continued`, the tokens chosen
greedily behind it.
"""

import json
import sys


def main(request: str, answer: str) -> None:
    import vllm

    with open(request) as file:
        wanted = json.load(file)

    def change(config: object) -> object:
        if wanted["intermediate_size"] is not None:  # not by transformers' own way, which takes no list
            object.__setattr__(config, "intermediate_size", wanted["intermediate_size"])
        return config

    engine = vllm.LLM(
        model=wanted["folder"],
        dtype="float32",
        enable_prefix_caching=False,  # with it, a Mamba hybrid's prompt beyond one chunk raises an IndexError on a CPU
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        hf_overrides=change,
    )
    greedy = {"temperature": 0.0, "ignore_eos": True}
    score = vllm.SamplingParams(max_tokens=1, prompt_logprobs=1, **greedy)
    rows = []
    for row in wanted["rows"]:  # of the first token there is no probability
        [scored] = engine.generate([{"prompt_token_ids": row}], score, use_tqdm=False)
        places = scored.prompt_logprobs[1:]
        of_row = [place[token].logprob for token, place in zip(row[1:], places, strict=True)]
        best = [next(token for token, one in place.items() if one.rank == 1) for place in places]
        rows.append({"log_probabilities": of_row, "best": best})
    further = vllm.SamplingParams(max_tokens=wanted["new_tokens"], **greedy)
    continued = engine.generate(wanted["prompts"], further, use_tqdm=False)
    found = {
        "version": vllm.__version__,
        "rows": rows,
        "prompts": [list(one.prompt_token_ids) for one in continued],
        "continued": [list(one.outputs[0].token_ids) for one in continued],
    }
    with open(answer, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
