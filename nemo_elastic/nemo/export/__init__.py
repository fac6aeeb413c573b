"""Nested checkpoints and children, and the proof that they are the same."""
