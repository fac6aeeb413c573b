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
            # The server leaves out a token that ends inside a character: one that does not is forced. The
            # log-probabilities are those before that, and before any other sampling.
            plain = _post(server, "/tokenize", {"content": "a"})["tokens"][0]
            for end in wanted["ends"]:
                _log_probabilities(server, wanted["row"][:end], wanted["vocab"], plain, cached=True).tofile(values)
            last = wanted["row"][: wanted["ends"][-1]]
            _log_probabilities(server, last, wanted["vocab"], plain, cached=False).tofile(values)
            continued = [_continued(server, prompt, wanted["new_tokens"]) for prompt in wanted["prompts"]]
            texts = [_post(server, "/tokenize", {"content": text})["tokens"] for text in wanted["texts"]]
            files.append({"texts": texts, "continued": continued})
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


def _log_probabilities(server: Any, tokens: list[int], vocab: int, plain: int, *, cached: bool) -> Any:
    options = {"n_predict": 1, "n_probs": vocab, "cache_prompt": cached, "logit_bias": [[plain, 1000.0]]}
    found = server.handle_completions({"prompt": tokens, "temperature": 0.0, **options})
    if "choices" not in found:
        raise RuntimeError(json.dumps(found)[:300])
    row = array("f", [float("nan")]) * vocab
    for entry in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


def _continued(server: Any, prompt: list[int], new_tokens: int) -> list[int]:
    options = {"n_predict": new_tokens, "cache_prompt": False, "temperature": 0.0, "return_tokens": True}
    return _post(server, "/completion", {"prompt": prompt, **options})["tokens"]


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    connection = HTTPConnection(urlsplit(server.listening_address).netloc)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    found = json.load(connection.getresponse())
    if "error" in found:
        raise RuntimeError(json.dumps(found)[:300])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
