"""Line charts as inline SVG."""

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maekit.pages.html import Html

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
    kept = []
    for number in range(bins):
        part = points[len(points) * number // bins : len(points) * (number + 1) // bins]
        chosen = {min(range(len(part)), key=lambda i: part[i][1]), max(range(len(part)), key=lambda i: part[i][1])}
        kept += [part[i] for i in sorted(chosen)]
    return kept


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
    thinned = [Line(line.name, thin(line.points)) for line in lines if line.points]
    every = [point for line in thinned for point in line.points]
    level = _scale([x for x, _ in every])
    upright = _scale([y for _, y in every], from_zero=from_zero, may_be_logarithmic=not from_zero)
    unit = f"{unit}, logarithmic" if upright.logarithmic else unit

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + level.share(point[0]) * (_WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_HEIGHT - _BOTTOM - upright.share(point[1]) * (_HEIGHT - _TOP - _BOTTOM), 1)

    drawn = [_axes(level, upright, place, (across, unit), _percent if share else tick_label)]
    for number, line in enumerate(thinned):
        places = [place(point) for point in line.points]
        path = "".join(f"{'ML'[i > 0]}{x:g} {y:g}" for i, (x, y) in enumerate(places))
        drawn.append(f'<path class="line line-{number}" d="{path}"/>')
        if len(places) <= _FEW:
            drawn += [f'<circle class="dot-{number}" cx="{x:g}" cy="{y:g}" r="2.4"/>' for x, y in places]
    form = _percent if share else "{:.4g}".format
    said = "; ".join(_in_words(line, form, across) for line in lines if line.points)
    colours = "".join(
        f'<li><i style="background: var(--{name})"></i>{html.escape(line.name)}</li>'
        for name, line in zip(("first", "second"), thinned, strict=False)
    )
    return Html(
        f'<figure><h3>{html.escape(title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(said)}">{"".join(drawn)}</svg>'
        + (f'<ul class="legend">{colours}</ul>' if len(thinned) > 1 else "")
        + f"<figcaption>{html.escape(said)}</figcaption></figure>"
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


def _axes(
    across: Scale,
    upright: Scale,
    place: Callable[[tuple[float, float]], tuple[float, float]],
    names: tuple[str, str],
    label: Callable[[float], str],
) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    drawn = []
    for value in upright.ticks():
        _, y = place((across.low, value))
        drawn.append(f'<path class="axis" d="M{_LEFT} {y:g}H{right}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{label(value)}</text>')
    for value in across.ticks():
        x, _ = place((value, upright.low))
        drawn.append(f'<path class="axis" d="M{x:g} {bottom}v4"/>')
        drawn.append(f'<text x="{x:g}" y="{bottom + 17}" text-anchor="middle">{tick_label(value)}</text>')
    drawn.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    drawn.append(f'<text x="4" y="14">{html.escape(names[1])}</text>')
    middle = (_LEFT + right) / 2
    drawn.append(f'<text x="{middle:g}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(names[0])}</text>')
    return "".join(drawn)


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


def by_step(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points by ascending step, keeping the last of several at one step."""
    ordered = sorted(pairs, key=lambda pair: pair[0])
    return [list(same)[-1] for _, same in itertools.groupby(ordered, key=lambda pair: pair[0])]
