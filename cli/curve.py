"""Draws a small curve in the terminal with braille characters, each two dots wide and four dots high."""

import itertools
import math
from collections.abc import Sequence

_FIRST = 0x2800
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
# Share of the highest values to clip: the losses of the first steps would flatten the rest of the curve.
_CUT_OFF = 0.05


def draw(points: Sequence[tuple[float, float]], *, label: str, width: int = 60, height: int = 10) -> list[str]:
    """Draw values over steps.

    Args:
        points: (step, value) pairs, at least two, with at least two different steps.
        label: name of the values.
        width: width of the curve, in characters.
        height: height of the curve, in lines.

    Returns:
        lines of text, with the axes.
    """
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    values = sorted(y for _, y in points)
    low, high = values[0], values[math.ceil(len(values) * (1 - _CUT_OFF)) - 1]
    span = (high - low) or 1.0
    gathered: dict[int, list[float]] = {}
    for x, y in points:
        gathered.setdefault(round((x - first) / (last - first) * (2 * width - 1)), []).append(y)
    known = [(column, sum(ys) / len(ys)) for column, ys in sorted(gathered.items())]
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for column in range(2 * width):
        (left, y0), (right, y1) = next(pair for pair in itertools.pairwise(known) if column <= pair[1][0])
        value = y0 + (y1 - y0) * (column - left) / (right - left)
        row = round((1 - min(1.0, (value - low) / span)) * (4 * height - 1))
        # Connected to the previous dot, so that a steep curve has no gaps.
        for dot in range(min(row, row if before is None else before), max(row, row if before is None else before) + 1):
            cells[dot // 4][column // 2] |= _DOTS[column % 2][dot % 4]
        before = row
    margin = max(len(f"{high:.4g}"), len(f"{low:.4g}"))
    lines = [f"{label}, step {first:g} to {last:g}"]
    for number, row_of_cells in enumerate(cells):
        edge = f"{high:.4g}" if number == 0 else f"{low:.4g}" if number == height - 1 else ""
        lines.append(f"{edge:>{margin}} │" + "".join(chr(_FIRST + cell) for cell in row_of_cells).rstrip(chr(_FIRST)))
    lines.append(f"{'':>{margin}} └" + "─" * width)
    return lines
