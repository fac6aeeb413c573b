"""Plain NeMo: nothing here is elastic."""
