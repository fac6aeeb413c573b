"""The next token from logits: the largest, or drawn at a temperature among the k largest.

    p = softmax(logits / temperature)   over the top k;   temperature 0: argmax

Draws come from a generator seeded per call, so a generation is a function of weights, prompt and seed.
"""

import torch
from torch import Tensor


def next_tokens(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """`[b, v]` -> `[b]`. Drawn on the CPU, so that a seed means the same on every device."""
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits.to("cpu", torch.float32) / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        values, places = scaled.topk(top_k)
        drawn = torch.multinomial(values.softmax(-1), 1, generator=generator)
        return places.gather(1, drawn).squeeze(1).to(logits.device)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(1).to(logits.device)
