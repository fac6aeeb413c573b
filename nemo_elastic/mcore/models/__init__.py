"""Whole models, plain and elastic: built, filled with a parent's weights, evaluated, timed."""
