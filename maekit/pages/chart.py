"""Line charts as inline SVG."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maekit.pages.html import Html, escaped, legend

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 400, 250  # SVG units; on the page the chart fills its column
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 26, 40
_BINS = 150
_TICKS = 5
_FEW = 40  # points; up to this number, each is marked by a dot


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: label of the line.
        points: finite (x, y) pairs by ascending x.
    """

    name: str
    points: Points


@dataclass(frozen=True)
class Scale:
    """Maps values to positions along an axis.

    Attributes:
        low: value at the start of the axis.
        high: value at the end of the axis.
        logarithmic: whether the axis is logarithmic.
    """

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return about three to seven round values within the scale."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [
                m * 10.0**decade for decade in decades for m in (1, 2, 5) if self.low <= m * 10.0**decade <= self.high
            ]
            if len(found) > 2:
                return found[:: -(-len(found) // (_TICKS + 2))]
        rough = (self.high - self.low) / _TICKS
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def thin(points: Points, bins: int = _BINS) -> list[tuple[float, float]]:
    """Return at most two points per bin, its lowest and its highest, so that no spike is lost."""
    if len(points) <= 2 * bins:
        return list(points)

    def value(number: int) -> float:
        return points[number][1]

    bounds = [len(points) * number // bins for number in range(bins + 1)]
    spans = itertools.starmap(range, itertools.pairwise(bounds))
    return [points[i] for span in spans for i in sorted({min(span, key=value), max(span, key=value)})]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    from_zero: bool = False,
    share: bool = False,
    across: str = "step",
) -> Html:
    """Return a line chart as a figure.

    Args:
        title: title of the chart.
        lines: one or two lines (a page has colours for two), with at least one point in total.
        unit: unit of the values.
        from_zero: whether the y axis starts at 0; if not, it is logarithmic for positive values that span more than a
            factor of three.
        share: whether values are shares, shown in percent.
        across: label of the x axis.
    """
    lines = [line for line in lines if line.points]
    thinned = [thin(line.points) for line in lines]
    xs, ys = zip(*itertools.chain(*thinned), strict=True)
    x_scale, y_scale = _scale(xs), _scale(ys, from_zero=from_zero, may_be_logarithmic=not from_zero)
    unit = f"{unit}, logarithmic" if y_scale.logarithmic else unit
    drawn = [_axes(x_scale, y_scale, _percent if share else tick_label), _text(4, 14, unit)]
    drawn.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, across, anchor="middle"))
    for number, points in enumerate(thinned):
        positions = [(_x(x_scale, x), _y(y_scale, y)) for x, y in points]
        path = "L".join(f"{x:g} {y:g}" for x, y in positions)
        drawn.append(f'<path class="line line-{number}" d="M{path}"/>')
        if len(points) <= _FEW:
            drawn += [f'<circle class="dot-{number}" cx="{x:g}" cy="{y:g}" r="2.4"/>' for x, y in positions]
    in_words = escaped("; ".join(_in_words(line, _percent if share else "{:.4g}".format, across) for line in lines))
    names = zip(("var(--first)", "var(--second)"), (line.name for line in lines), strict=False)
    return Html(
        f'<figure><h3>{escaped(title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{in_words}">{"".join(drawn)}</svg>{legend(names) if len(lines) > 1 else ""}'
        f"<figcaption>{in_words}</figcaption></figure>"
    )


def _scale(values: Sequence[float], *, from_zero: bool = False, may_be_logarithmic: bool = False) -> Scale:
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    if may_be_logarithmic and low > 0 and high > 3 * low:
        return Scale(low, high, True)
    if high - low <= 1e-9 * abs(high):  # all the same
        return Scale(low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    return Scale(low, high)


def _x(scale: Scale, value: float) -> float:
    return round(_LEFT + scale.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(scale: Scale, value: float) -> float:
    return round(_HEIGHT - _BOTTOM - scale.share(value) * (_HEIGHT - _TOP - _BOTTOM), 1)


def _axes(x_scale: Scale, y_scale: Scale, label: Callable[[float], str]) -> str:
    """Draw both axes with their ticks; `label` is for values of y."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    paths = [f"M{_LEFT} {_TOP}V{bottom}H{right}"]
    texts = []
    for value in y_scale.ticks():
        y = _y(y_scale, value)
        paths.append(f"M{_LEFT} {y:g}H{right}")
        texts.append(_text(_LEFT - 6, y + 4, label(value), anchor="end"))
    for value in x_scale.ticks():
        x = _x(x_scale, value)
        paths.append(f"M{x:g} {bottom}v4")
        texts.append(_text(x, bottom + 17, tick_label(value), anchor="middle"))
    return f'<path class="axis" d="{"".join(paths)}"/>{"".join(texts)}'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escaped(text)}</text>'


def tick_label(value: float) -> str:
    """Return a round value in few characters: 0.5, 2e-05, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.6g}{letter}"
    return f"{0.0 if abs(value) < 1e-15 else value:.6g}"


def _percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def _in_words(line: Line, said: Callable[[float], str], across: str) -> str:
    """Summarise a line in a few words."""
    (first, start), (last, end) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.name} {said(start)} at {across} {first:g}"
    low, high = min(y for _, y in line.points), max(y for _, y in line.points)
    between = [f"{name} {said(y)}" for name, y in (("lowest", low), ("highest", high)) if y not in (start, end)]
    ends = f"{line.name} {said(start)} at {across} {first:.12g}, {said(end)} at {across} {last:.12g}"
    return ", ".join([ends, *between])
