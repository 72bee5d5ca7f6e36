"""Numbers and lists as text for messages."""

from collections.abc import Sequence


def count(noun: str, number: int, plural: str | None = None) -> str:
    """Return a number with its noun: `1 shard`, `2 shards`. The plural needs to be given if it is not noun + s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_few(problems: Sequence[object], most: int = 3) -> str:
    """Return a list of problems as one line: the first `most`, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join([*map(str, problems[:most]), *more])
