"""What a run writes into its OUT, by name: what `--force` removes there, and what a run's folder is told by."""

PARTS = (
    "checkpoints", "nested", "children", "logs", "sorted", "importance", "results.json", "evaluations", "report",
    "config.json", "zero_shot.json",
)  # fmt: skip
MARKS = ("checkpoints", "importance", "logs", "nested", "sorted")  # no parent and no checkpoint has one of these
