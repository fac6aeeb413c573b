"""Text, tokens and the order in which windows of tokens are read. NumPy only: importable without torch."""
