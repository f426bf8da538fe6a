"""Line charts as inline SVG, made of text alone: colours and letters come from the page's style, so that they follow dark, light and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 24, 46
LETTER = 7.0
"""Width of a letter of a tick, about."""
MOST = 1000
"""Points of a line that are drawn."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """``points``: (x, y), ascending in x; ``kind``: 0 to 7, which of the page's colours; ``steps``: y holds until the next x; ``marks``: a dot at each point."""

    name: str
    points: Points
    kind: int = 0
    steps: bool = False
    marks: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of x that belongs to something, such as a block's noise interval."""

    name: str
    start: float
    end: float
    kind: int = 0


@dataclass(frozen=True)
class Chart:
    """``title`` and ``description`` are read aloud; ``log_x``: the x axis is logarithmic."""

    title: str
    description: str
    x: str
    y: str
    lines: tuple[Line, ...] = ()
    bands: tuple[Band, ...] = ()
    log_x: bool = False
    zero: bool = False

    def svg(self, name: str) -> str:
        """The drawing; ``name``: unique in its page."""
        lines = [_finite(line) for line in self.lines]
        xs = [x for line in lines for x, _ in line.points] + [x for b in self.bands for x in (b.start, b.end)]
        ys = [y for line in lines for _, y in line.points] + [0.0] * self.zero
        if not xs:
            raise ValueError(f"{self.title}: nothing to draw")
        at_x = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=self.log_x)
        at_y = _Axis(min(ys, default=0.0), max(ys, default=1.0), HEIGHT - BOTTOM, TOP, rounded=True)
        parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-t {name}-d">',
            f'<title id="{name}-t">{escape(self.title)}</title><desc id="{name}-d">{escape(self.description)}</desc>',
        ]
        parts += [_band(band, at_x) for band in self.bands]
        for value in at_y.ticks():
            y = at_y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in _apart(at_x):
            x = at_x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(value)}</text>'
            )
        parts += [_line(line, at_x, at_y) for line in lines]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x)}</text>')
        parts.append(
            f'<text class="name" transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(self.y)}</text>'
        )
        return "".join([*parts, "</svg>"])

    @property
    def legend(self) -> tuple[tuple[str, int, bool], ...]:
        """(name, kind, dashed) of the lines that have a name."""
        return tuple((line.name, line.kind, line.dashed) for line in self.lines if line.name)


class _Axis:
    """From numbers to places."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False, rounded: bool = False):
        self.log = log and low > 0
        if low == high:
            low, high = (low / 2, high * 2) if self.log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self.step = _step(high - low)
        if rounded:
            low, high = math.floor(low / self.step) * self.step, math.ceil(high / self.step) * self.step
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, (last - first) // 5)
            found = [10.0**e for e in range(first, last + 1, every)]
            if len(found) > 2:
                return found
            fine = [f * 10.0**e for e in range(first - 1, last + 1) for f in (1, 2, 5)]
            fine = [v for v in fine if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if len(fine) > 1:
                return fine
        count = math.floor((self.high + 1e-9 * self.step) / self.step) - math.ceil(self.low / self.step - 1e-9)
        first = math.ceil(self.low / self.step - 1e-9)
        return [(first + i) * self.step for i in range(count + 1)]


def _apart(axis: _Axis) -> list[float]:
    """The ticks of a horizontal axis whose numbers do not run into each other."""
    kept: list[float] = []
    for value in axis.ticks():
        reach = LETTER * (len(number(value)) + 2) / 2
        if not kept or axis(value) - axis(kept[-1]) > reach + LETTER * len(number(kept[-1])) / 2:
            kept.append(value)
    return kept


def _step(width: float) -> float:
    """A round number that goes into ``width`` about five times."""
    power = 10.0 ** math.floor(math.log10(width / 5))
    return next(f * power for f in (1, 2, 5, 10) if width / (f * power) <= 6)


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    every = max(1, math.ceil(len(points) / MOST))
    kept = points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])
    return Line(line.name, kept, line.kind, line.steps, line.marks, line.dashed)


def _band(band: Band, at_x: _Axis) -> str:
    a, b = sorted((at_x(band.start), at_x(band.end)))
    said = next((n for n in (band.name, band.name.split()[-1]) if b - a > LETTER * (len(n) + 1)), "")
    label = f'<text class="tick" x="{(a + b) / 2:.1f}" y="{TOP - 7}" text-anchor="middle">{escape(said)}</text>'
    return (
        f'<rect class="band k{band.kind % 8}" x="{a:.1f}" y="{TOP}" width="{max(b - a, 0.5):.1f}" height="{HEIGHT - BOTTOM - TOP}">'
        f"<title>{escape(band.name)}</title></rect>{label}"
    )


def _line(line: Line, at_x: _Axis, at_y: _Axis) -> str:
    places = [(at_x(x), at_y(y)) for x, y in line.points]
    if line.steps:
        places = [p for i, (x, y) in enumerate(places) for p in ([(x, places[i - 1][1])] if i else []) + [(x, y)]]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    found = f'<polyline class="line k{line.kind % 8}" points="{drawn}"{dash}/>' if len(places) > 1 else ""
    if line.marks or len(places) == 1:
        found += "".join(
            f'<circle class="mark k{line.kind % 8}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5"><title>{escape(line.name)}: {number(y)}</title></circle>'
            for x, y in line.points
        )
    return found


def number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
