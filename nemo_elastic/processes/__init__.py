"""Which process this is, the one run that an OUT has, and what it leaves there."""
