"""NeMo side of the package: the only place that imports `nemo.*` and `lightning`."""
