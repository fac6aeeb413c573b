"""What llama.cpp makes of GGUF files, in a Python that has `xllamacpp` and need not have this package.

    PYTHON gguf_reference.py REQUEST.json OUT.f32 ANSWER.json

REQUEST: `files`, `vocab`, `row` (tokens), `ends` (positions in it), `texts`, `prompts` (lists of tokens), `new_tokens`,
`threads`. Per file, OUT has fp32 log-probabilities of the whole vocabulary: behind the first E tokens of the row for
every E of `ends`, taken through the cache one after the other, and once more behind the last E, by one prefill. ANSWER:
per file, the tokens of each text, and the tokens that greedy choice continues each prompt by (fewer than `new_tokens`
where the end token was chosen). Cache fp32, no flash attention, CPU only. It imports xllamacpp, nothing else; the
server in it listens on a port of this machine meanwhile, and nothing is looked up anywhere.
"""

import json
import sys
from array import array
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit


def main(request: str, out: str, answer: str) -> None:
    """See the module's docstring."""
    import xllamacpp

    with open(request) as file:
        wanted = json.load(file)
    room = max(map(len, [wanted["row"], *wanted["prompts"]])) + wanted["new_tokens"] + 1
    files = []
    with open(out, "wb") as values:
        for path in wanted["files"]:
            server = _server(xllamacpp, path, room, wanted["threads"])
            for end in wanted["ends"]:
                _log_probabilities(server, wanted["row"][:end], wanted["vocab"], cached=True).tofile(values)
            last = wanted["row"][: wanted["ends"][-1]]
            _log_probabilities(server, last, wanted["vocab"], cached=False).tofile(values)
            continued = [[e["id"] for e in _complete(server, p, wanted["new_tokens"], 1)] for p in wanted["prompts"]]
            files.append({"texts": [_tokens(server, text) for text in wanted["texts"]], "continued": continued})
            del server
    with open(answer, "w") as file:
        json.dump({"xllamacpp": xllamacpp.__version__, "files": files}, file)


def _server(xllamacpp: Any, path: str, room: int, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = params.n_batch = params.n_ubatch = -(-room // 256) * 256
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _complete(server: Any, prompt: list[int], new_tokens: int, probabilities: int, cached: bool = False) -> list[Any]:
    """Per new token, its id and the log-probabilities of the likeliest ones, before any sampling."""
    options = {"n_predict": new_tokens, "n_probs": probabilities, "cache_prompt": cached, "temperature": 0.0}
    found = server.handle_completions({"prompt": prompt, **options})
    if "choices" not in found:
        raise RuntimeError(json.dumps(found)[:300])
    return found["choices"][0]["logprobs"]["content"]


def _log_probabilities(server: Any, tokens: list[int], vocab: int, *, cached: bool) -> Any:
    row = array("f", [float("nan")]) * vocab
    for entry in _complete(server, tokens, 1, vocab, cached)[0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


def _tokens(server: Any, text: str) -> list[int]:
    connection = HTTPConnection(urlsplit(server.listening_address).netloc)
    connection.request("POST", "/tokenize", json.dumps({"content": text}), {"Content-Type": "application/json"})
    return json.load(connection.getresponse())["tokens"]


if __name__ == "__main__":
    main(*sys.argv[1:])
