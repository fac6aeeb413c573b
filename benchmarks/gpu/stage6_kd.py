"""Stage 6: output layer and distillation loss at 12B widths: chunk lengths, the plain formula, ModelOpt."""

import gc

import torch
from registry import Found, Machine, check

CHUNKS = (256, 512, 1024, 2048, 4096)
TOKENS, HIDDEN, VOCAB = 8192, 5120, 131072


@check(
    stage=6,
    seconds=50,
    predicted={
        "ms_at_256": (150, 210),
        "ms_at_2048": (65, 90),
        "peak_gb_at_2048": (2.8, 6.5),
        "plain_peak_gb": (20, 30),
    },
)
def kd_head(machine: Machine) -> Found:
    """8192 tokens, hidden 5120, vocabulary 131072, bf16: milliseconds and peak memory of a forward and backward"""
    from kd_loss import modelopt_loss, plain_kl

    from nemo_elastic.config.sections import DistillConfig
    from nemo_elastic.distill.fused import fused_kd_loss

    tokens, hidden, vocab = (64, 16, 512) if machine.tiny else (TOKENS, HIDDEN, VOCAB)
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(machine.device, dtype)

    student, teacher = draw(tokens, hidden).requires_grad_(), draw(tokens, hidden)
    weight, teacher_weight = (draw(vocab, hidden) / hidden**0.5).requires_grad_(), draw(vocab, hidden) / hidden**0.5
    found: dict[str, object] = {}

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        student.grad = weight.grad = None

    for chunk in CHUNKS:
        config = DistillConfig(chunk_tokens=min(chunk, tokens) if machine.tiny else chunk)

        def ours(config: DistillConfig = config) -> None:
            backward(fused_kd_loss(student, weight, teacher, teacher_weight, config).total)

        found[f"ms_at_{chunk}"] = machine.milliseconds(ours, 3)
        found[f"peak_gb_at_{chunk}"] = machine.peak_bytes(ours) / 1e9
    stock = modelopt_loss(1)
    others = {"plain": lambda s, t: plain_kl(s, t, None)}
    if stock is not None:
        others["modelopt"] = lambda s, t: stock(s.unsqueeze(1), t.unsqueeze(1))
    for name, loss in others.items():

        def whole(loss: object = loss) -> None:
            backward(loss(student @ weight.t(), teacher @ teacher_weight.t()))

        gc.collect()
        try:
            found[f"{name}_ms"] = machine.milliseconds(whole, 3)
            found[f"{name}_peak_gb"] = machine.peak_bytes(whole) / 1e9
        except torch.OutOfMemoryError:
            found[f"{name}_ms"] = "out of memory"
            torch.cuda.empty_cache()
    return Found(found)
