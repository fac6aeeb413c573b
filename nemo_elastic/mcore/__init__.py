"""Megatron-core side of the package: the only place that imports `megatron.*`."""
