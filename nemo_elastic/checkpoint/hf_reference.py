"""Logits of Hugging Face folders by transformers' own classes, in a Python that need not have this package.

    PYTHON hf_reference.py REQUEST.json OUT.safetensors ANSWER.json

REQUEST: `folders`, `norms` (of each folder the final norm's name, and in a model of blocks that of the norm between a
block's halves, else null), `tokens` (lists `[n, b, s]`), `trace`, perhaps `labels` and `masks` like tokens. OUT holds
`logits.F.N` (folder F, batch N), with labels `loss.F.N` instead (sum of the cross entropy, tokens), or with `trace`
`hidden.F.I`: the final norm of what layer I (half a block) leaves of the first row of the first batch. ANSWER: per
folder the class, the parameter count, and what transformers missed, did not expect or found misshapen. Only safetensors
are read, no code of a folder is run, and nothing is looked up on the hub. It imports torch, transformers and
safetensors, nothing else.
"""

import json
import os
import sys
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main(request: str, out: str, answer: str) -> None:
    """See the module's docstring."""
    os.environ.update(OFFLINE)
    import torch
    import transformers
    from safetensors.torch import save_file

    with open(request) as file:
        wanted = json.load(file)
    batches = [torch.tensor(batch) for batch in wanted["tokens"]]
    found: dict[str, Any] = {}
    folders = []
    for number, folder in enumerate(wanted["folders"]):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model.eval()
        final, between = wanted["norms"][number]
        trace = _follow(model, between) if wanted["trace"] else None
        with torch.no_grad():
            for place, batch in enumerate(batches):
                if trace is not None:
                    model(input_ids=batch[:1], use_cache=False)
                    for layer, hidden in trace.items():
                        found[f"hidden.{number}.{layer}"] = getattr(model.model, final)(hidden)[0].float().contiguous()
                    break
                logits = model(input_ids=batch, use_cache=False).logits
                if "labels" in wanted:
                    labels, mask = (torch.tensor(wanted[name][place]) for name in ("labels", "masks"))
                    losses = torch.nn.functional.cross_entropy(logits.float().mT, labels, reduction="none").double()
                    found[f"loss.{number}.{place}"] = torch.stack([(losses * mask).sum(), mask.double().sum()])
                    continue
                found[f"logits.{number}.{place}"] = logits.float().contiguous()
        folders.append(
            {
                "class": f"{type(model).__module__}.{type(model).__name__}",
                "parameters": sum(t.numel() for t in (*model.parameters(), *_stored_buffers(model))),
                "loading": {name: sorted(map(str, value)) for name, value in loading.items() if value},
            }
        )
        del model
    save_file(found, out)
    with open(answer, "w") as file:
        json.dump({"transformers": transformers.__version__, "torch": torch.__version__, "folders": folders}, file)


def _stored_buffers(model: Any) -> list[Any]:
    """Buffers that are weights, as the bias by which experts are chosen; those that are computed are not stored."""
    stored = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in stored]


def _follow(model: Any, between: str | None) -> dict[int, Any]:
    """What every layer leaves, filled by the next forward; half a block leaves what its second norm is given."""
    trace: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            trace[layer] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def keep_input(layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            trace[layer] = inputs[0].detach()

        return hook

    for number, block in enumerate(model.model.layers):
        if between is None:
            block.register_forward_hook(keep(number))
            continue
        getattr(block, between).register_forward_pre_hook(keep_input(2 * number))
        block.register_forward_hook(keep(2 * number + 1))
    return trace


if __name__ == "__main__":
    main(*sys.argv[1:])
