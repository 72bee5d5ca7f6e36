"""What a pooling may be called: `avg`, `cls`, `std`, `avg2x2`, or several of them joined by `+`, as in `avg+std`.

What each is stands in `maekit.mae.pooling`. Imports nothing heavy: options are checked by it.
"""

from maekit.system.errors import InputError

# Not a pooling: the patch tokens themselves.
UNPOOLED = "tokens"
# How many vectors as long as a token each part gives.
_VECTORS = {"avg": 1, "cls": 1, "std": 1, "avg2x2": 4}
PARTS = tuple(_VECTORS)
CHOICES = f"{', '.join(PARTS)}, or several joined by +"


def check_pool(key: str, pool: str, also: tuple[str, ...] = ()) -> None:
    """Refuse what is no pooling.

    Args:
        key: of the setting that it was given by.
        pool: what was given.
        also: what may be given besides.

    Raises:
        InputError: a part is unknown, or is there twice.
    """
    parts = parts_of(pool)
    if pool in also or (set(parts) <= set(PARTS) and len(set(parts)) == len(parts)):
        return
    others = "".join(f"; or {other}" for other in also)
    raise InputError(f"`{key}` = {pool}: must be one of {CHOICES} (as in avg+std), each once{others}")


def parts_of(pool: str) -> list[str]:
    """Return the parts of a pooling, in the order in which they stand in the vector."""
    return pool.split("+")


def vectors_in(pool: str) -> int:
    """Return k: the embedding of a pooling is k times as long as a token."""
    return sum(_VECTORS[part] for part in parts_of(pool))
