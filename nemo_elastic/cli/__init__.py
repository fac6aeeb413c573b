"""The command line: one verb per file, each with `add_parser(subparsers)` and `run(arguments) -> exit code`."""
