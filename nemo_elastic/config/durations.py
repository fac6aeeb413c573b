"""Durations as Slurm writes them.

YAML reads an unquoted `03:55:00` as its seconds, which is what a number means here, too.
"""

import re

FORM = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)|(\d+(?:\.\d*)?)")


def seconds_of(text: str | None) -> float | None:
    """`HH:MM:SS`, `D-HH:MM:SS` or seconds, as seconds; None for None.

    Raises:
        ValueError: in other words, or no time at all.
    """
    if text is None:
        return None
    found = FORM.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} must be HH:MM:SS, D-HH:MM:SS or seconds")
    days, hours, minutes, seconds, plain = found.groups()
    total = float(plain) if plain else int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    if not total:
        raise ValueError(f"{text!r} leaves no time for a step; leave it empty for no limit")
    return float(total)
