"""Megatron's distributed checkpoints, read without executing anything and saved through signals."""
