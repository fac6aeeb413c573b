"""Megatron-core side of the package: the only place that imports `megatron.*`."""

from .runtime.login_node import name_an_architecture

name_an_architecture()
