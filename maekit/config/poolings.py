"""Names of poolings: `avg`, `cls`, `std`, `avg2x2`, or several of them joined by `+`, as in `avg+std`.

A part may name the block whose output it pools, counted from 1, as in `avg@8+avg@12`; without one it is the last.
`:pre` pools before the final norm, as in `avg@8:pre`. `maekit.mae.pooling` defines the poolings. This module checks
options, so it imports nothing heavy.
"""

import re
from typing import NamedTuple

from maekit.system.errors import InputError

# Not a pooling: the patch tokens themselves.
UNPOOLED = "tokens"
# Number of token-sized vectors that each part gives.
_VECTORS = {"avg": 1, "cls": 1, "std": 1, "avg2x2": 4}
PARTS = tuple(_VECTORS)
CHOICES = f"{', '.join(PARTS)}, or several joined by +"
_PART = re.compile(r"(?P<name>[a-z0-9]+)(?:@(?P<layer>[1-9][0-9]{0,3}))?(?P<pre>:pre)?")


class Part(NamedTuple):
    """One part of a pooling.

    Attributes:
        name: how tokens become a vector.
        layer: the block whose output is pooled, from 1; None for the last.
        is_normed: whether the final norm is applied before.
    """

    name: str
    layer: int | None = None
    is_normed: bool = True

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"@{self.layer}"
        return f"{self.name}{layer}{'' if self.is_normed else ':pre'}"


def check_pool(key: str, pool: str, also: tuple[str, ...] = (), *, layers: bool = False) -> None:
    """Refuse an unknown pooling.

    Args:
        key: key of the setting, for the message.
        pool: the value given.
        also: other values to accept.
        layers: accept parts of other layers than the last, and before the final norm.

    Raises:
        InputError: a part is unknown or repeated.
    """
    if pool in also:
        return
    parts = parts_of(pool)
    if len(set(parts)) == len(parts) and all(part.name in PARTS for part in parts):
        if layers or all(part == Part(part.name) for part in parts):
            return
        raise InputError(f"`{key}` = {pool}: here it is the output of the last layer")
    others = "".join(f"; or {other}" for other in also)
    raise InputError(f"`{key}` = {pool}: must be one of {CHOICES} (as in avg+std), each once{others}")


def parts_of(pool: str) -> list[Part]:
    """Return the parts of a pooling, in their order in the vector; one that cannot be read has its text as its name."""
    parts = []
    for text in pool.split("+"):
        match = _PART.fullmatch(text)
        parts.append(
            Part(match["name"], int(match["layer"]) if match["layer"] else None, not match["pre"])
            if match
            else Part(text)
        )
    return parts


def at_layer(pool: str, layer: int | None, *, is_normed: bool = True) -> str:
    """Return a pooling with its parts at a layer, and before the final norm unless `is_normed`.

    Parts that name a layer keep it.
    """
    parts = [
        part._replace(layer=part.layer or layer, is_normed=part.is_normed and is_normed) for part in parts_of(pool)
    ]
    return "+".join(map(str, parts))


def vectors_in(pool: str) -> int:
    """Return k: the embedding of a pooling is k times as long as a token."""
    return sum(_VECTORS[part.name] for part in parts_of(pool))
