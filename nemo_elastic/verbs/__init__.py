"""What the quick verbs answer, as plain values: the command line prints it, Python gets it typed. No torch."""
