"""What may vary: the parent's sizes, elastic dims, the one table of their axes, and the one cutter."""
