"""A login node: a CUDA build of torch and nvcc, but no GPU to build for.

megatron-core 0.15.3 compiles an allocator when it is imported (`inference/unified_memory.py:71`). torch then asks for
the GPUs that are there, finds none, and raises an IndexError that Megatron does not expect. An architecture in the
environment is enough; the allocator itself is of no use without a GPU.
"""

import os

import torch

VARIABLE, ANY = "TORCH_CUDA_ARCH_LIST", "9.0"


def name_an_architecture() -> None:
    """Before the first import of Megatron; nothing where a GPU is, where torch has no CUDA, or where one is named."""
    if torch.version.cuda and not torch.cuda.is_available():
        os.environ.setdefault(VARIABLE, ANY)
