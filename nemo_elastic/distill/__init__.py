"""What the children learn from: distillation losses that never gather a vocabulary, and the curriculum."""
