"""Names of poolings: `avg`, `cls`, `std`, `avg2x2`, or several of them joined by `+`, as in `avg+std`.

`maekit.mae.pooling` defines them. This module checks options, so it imports nothing heavy.
"""

from maekit.system.errors import InputError

# Not a pooling: the patch tokens themselves.
UNPOOLED = "tokens"
# Number of token-sized vectors that each part gives.
_VECTORS = {"avg": 1, "cls": 1, "std": 1, "avg2x2": 4}
PARTS = tuple(_VECTORS)
CHOICES = f"{', '.join(PARTS)}, or several joined by +"


def check_pool(key: str, pool: str, also: tuple[str, ...] = ()) -> None:
    """Refuse an unknown pooling.

    Args:
        key: key of the setting, for the message.
        pool: the value given.
        also: other values to accept.

    Raises:
        InputError: a part is unknown or repeated.
    """
    parts = parts_of(pool)
    if pool in also or (set(parts) <= set(PARTS) and len(set(parts)) == len(parts)):
        return
    others = "".join(f"; or {other}" for other in also)
    raise InputError(f"`{key}` = {pool}: must be one of {CHOICES} (as in avg+std), each once{others}")


def parts_of(pool: str) -> list[str]:
    """Return the parts of a pooling, in their order in the vector."""
    return pool.split("+")


def vectors_in(pool: str) -> int:
    """Return k: the embedding of a pooling is k times as long as a token."""
    return sum(_VECTORS[part] for part in parts_of(pool))
