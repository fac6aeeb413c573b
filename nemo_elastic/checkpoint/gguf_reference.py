"""What llama.cpp makes of GGUF files, in a Python that has `xllamacpp` and need not have this package.

    PYTHON gguf_reference.py REQUEST.json OUT.f32 ANSWER.json

REQUEST: `files`, `vocab`, `row` (tokens), `ends` (positions in it), `texts`, `continued` (lists of tokens), `prompt`
(tokens that each of them begins with), `threads`. Per file, OUT has fp32 log-probabilities of the whole vocabulary:
behind the first E tokens of the row for every E of `ends`, taken through the cache one after the other, and once more
behind the last E, by one prefill. ANSWER: per file, the tokens of each text, and for each list of `continued` the
likeliest token behind its prompt, and behind every longer beginning, through the cache. Nothing is left to llama.cpp's
own stopping. Cache fp32, no flash attention, CPU only. It imports xllamacpp, nothing else; the server in it listens on
a port of this machine meanwhile, and nothing is looked up anywhere.
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
    room = max(map(len, [wanted["row"], *wanted["continued"]])) + 1
    files = []
    with open(out, "wb") as values:
        for path in wanted["files"]:
            server = _server(xllamacpp, path, room, wanted["threads"])
            # The server leaves out a token that ends inside a character: one that does not is forced. The
            # log-probabilities are those before that, and before any other sampling.
            plain = _post(server, "/tokenize", {"content": "a"})["tokens"][0]
            for end in wanted["ends"]:
                _whole(server, wanted["row"][:end], wanted["vocab"], plain, cached=True).tofile(values)
            last = wanted["row"][: wanted["ends"][-1]]
            _whole(server, last, wanted["vocab"], plain, cached=False).tofile(values)
            chosen = [
                [
                    _likeliest(server, row[:end], 1, plain, cached=True)[0]["id"]
                    for end in range(wanted["prompt"], len(row))
                ]
                for row in wanted["continued"]
            ]
            texts = [_post(server, "/tokenize", {"content": text})["tokens"] for text in wanted["texts"]]
            files.append({"texts": texts, "chosen": chosen})
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


def _likeliest(server: Any, tokens: list[int], count: int, plain: int, *, cached: bool) -> Any:
    options = {"n_predict": 1, "n_probs": count, "cache_prompt": cached, "logit_bias": [[plain, 1000.0]]}
    found = server.handle_completions({"prompt": tokens, "temperature": 0.0, **options})
    if "choices" not in found:
        raise RuntimeError(json.dumps(found)[:300])
    return found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def _whole(server: Any, tokens: list[int], vocab: int, plain: int, *, cached: bool) -> Any:
    row = array("f", [float("nan")]) * vocab
    for entry in _likeliest(server, tokens, vocab, plain, cached=cached):
        row[entry["id"]] = entry["logprob"]
    return row


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    connection = HTTPConnection(urlsplit(server.listening_address).netloc)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    found = json.load(connection.getresponse())
    if "error" in found:
        raise RuntimeError(json.dumps(found)[:300])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
