"""Numbers, lists and other people's words as text for messages."""

import re
from collections.abc import Sequence

# Control characters and escapes; marks that are invisible, or turn the direction of the text; lone surrogates.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f]+"
)


def printable(text: str) -> str:
    """Return a text as one line that a terminal shows and does not obey: `\\x1b` or `\\n` for what is no sign."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def count(noun: str, number: int, plural: str | None = None) -> str:
    """Return a number with its noun: `1 shard`, `2 shards`. The plural needs to be given if it is not noun + s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_few(problems: Sequence[object], most: int = 3) -> str:
    """Return a list of problems as one line: the first `most`, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join([*map(str, problems[:most]), *more])
