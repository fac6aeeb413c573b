"""What ships of a small trained parent: bf16 weights, its sizes, and a card that says how it was made.

    model.safetensors   Megatron's state-dict names of the local spec, single process, bf16
    config.json         sizes by their `SSMConfig` names
    README.md           the card, with the hash of the weights and the command that makes them again

Nothing here imports NeMo: the module is what it built, already.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nemo_elastic.data.corpus import CorpusList
from nemo_elastic.data.windows import Windows
from nemo_elastic.kinds import kinds


def bf16_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a Megatron module as bf16 on the CPU (Megatron's `_extra_state` is no tensor)."""
    state = module.state_dict()
    return {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }


@torch.no_grad()
def heldout_loss(module: nn.Module, windows: Windows, batch_size: int = 8, batches: int | None = None) -> float:
    """Mean cross-entropy in nats per token over the first `batches` batches of `windows` (all of them by default).

    The weights are those of `module` rounded to bf16, which is what ships; the arithmetic is the module's own.
    """
    kept = {name: p.detach().clone() for name, p in module.named_parameters()}
    was_training = module.training
    try:
        for p in module.parameters():
            p.copy_(p.to(torch.bfloat16))
        module.eval()
        total = 0.0
        count = windows.per_epoch // batch_size if batches is None else batches
        for index in range(count):
            tokens, labels = map(torch.from_numpy, windows.batch(index * batch_size, batch_size))
            positions = torch.arange(windows.seq_length).expand_as(tokens)
            total += module(tokens, positions, None, labels=labels).double().mean().item()
        return total / count
    finally:
        for name, p in module.named_parameters():
            p.copy_(kept[name])
        module.train(was_training)


@contextmanager
def expert_load(module: nn.Module) -> Iterator[list[float]]:
    """Afterwards, per layer with experts, the busiest one's tokens of the forwards inside over the mean."""
    from nemo_elastic.mcore.kernels.routing import Router

    found: list[float] = []
    routers = [part for part in module.modules() if isinstance(part, Router)]
    for router in routers:
        router.tally = torch.zeros(len(router.weight), dtype=torch.int64, device=router.weight.device)
    yield found
    for router in routers:
        found.append(round(router.tally.max().item() / router.tally.double().mean().item(), 4))
        router.tally = None


def save_parent(folder: Path, module: nn.Module, sizes: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Write weights and config.json; each under a temporary name first. Returns the weights' SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"model.{os.getpid()}.tmp"
    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in facts.items()}}
    save_file(bf16_weights(module), str(temporary), metadata=metadata)
    temporary.chmod(0o644)
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    temporary.replace(folder / "model.safetensors")
    _replace(folder / "config.json", json.dumps(dict(sizes), indent=2) + "\n")
    return digest


def save_card(
    folder: Path,
    *,
    sizes: Mapping[str, Any],
    facts: Mapping[str, Any],
    corpus: CorpusList,
    tokens: Mapping[str, int],
    sha256: str,
    command: str,
) -> None:
    """Write README.md.

    Args:
        facts: of the run, with `heldout_loss` in nats per token, `seed`, `steps`, `tokens`, `minutes`, `parameters`.
        tokens: length of the token stream per split.
        command: makes these files again.
    """
    heldout_bytes, loss = corpus.bytes_of("heldout"), facts["heldout_loss"]
    load = facts.get("expert_load")
    bits_per_byte = loss / math.log(2) * tokens["heldout"] / heldout_bytes
    legend = ", ".join(f"{kind.letter} {kind.words}" for kind in kinds())
    rows = {
        "sha256 of model.safetensors": f"`{sha256}`",
        "parameters": f"{facts['parameters']:,}",
        "layers": f"`{sizes['hybrid_override_pattern']}` ({legend})",
        "text": f"{corpus.bytes_of('train'):,} bytes, {tokens['train']:,} tokens; "
        f"held out by file: {heldout_bytes:,} bytes, {tokens['heldout']:,} tokens",
        "training": f"{facts['steps']:,} steps of {facts['global_batch_size']} x {sizes['seq_length']} tokens, "
        f"{facts['tokens']:,} tokens in all ({facts['epochs']} epochs)",
        "learning rate": f"{facts['lr']} (Adam, warm-up {facts['warmup_steps']} steps, cosine to "
        f"{facts['min_lr_ratio']:.0%}), {facts['budget_used']:.0%} of the schedule done",
        "wall time": f"{facts['minutes']} minutes on {facts['threads']} CPU thread(s), machine shared with other work",
        "seed": str(facts["seed"]),
        "made with": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"megatron-core {facts['megatron_core']}, NeMo {facts['nemo']}",
        "held-out loss": f"{loss:.4f} nats per token (all {tokens['heldout'] // sizes['seq_length']} windows less the "
        "last incomplete batch, bf16 weights, fp32 arithmetic)",
        "held-out bits per byte": f"{bits_per_byte:.4f}",
    }
    if load:
        rows["tokens of the busiest expert"] = (
            f"{min(load):.2f} to {max(load):.2f} times the mean of its layer, on the held-out text; training moved the "
            f"expert bias by {facts['bias_update_rate']} a step"
        )
    name = "Tiny hybrid parent with experts" if load else "Tiny hybrid parent"
    files = ". Tokenizer and list of the text are those of\n`../tiny_parent`."
    if (folder / "tokenizer.json").is_file():
        files = f""", `tokenizer.json` (byte-level BPE, {sizes["vocab_size"]} tokens, trained on the training
split), `corpus.json` (every file of the text with its SHA-256 and split, from Python {corpus.python})."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""# {name}

A small Mamba-attention language model, trained from nothing on Python's standard library (sources, and the help
texts of `pydoc_data.topics`), so that every machine has a real parent and its real text. It knows how Python
looks; it is no assistant and no code generator to rely on.

| | |
|---|---|
{table}

Files: `model.safetensors` (bf16, Megatron's names of the stack without Transformer Engine), `config.json` (sizes by
their `SSMConfig` names){files}

Made by

```
{command}
```

The run is a function of its seed and of the text, up to floating-point order. Where it was bounded by minutes, the
learning rate followed the clock; `--max-steps {facts["steps"]}` instead takes the same steps on any machine, with the
cosine over steps.
The text is under the PSF licence of Python; no text is contained in these files except as tokens' spellings.
"""
    _replace(folder / "README.md", text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
