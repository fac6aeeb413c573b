"""Nested elastic families of hybrid Mamba-attention language models for Megatron-core and NeMo.

One training run and one checkpoint hold the parent and all of its children (Nemotron Elastic,
arXiv 2511.16664). Start with `docs/architecture.md`.
"""

__version__ = "0.1.0"
