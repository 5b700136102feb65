"""Line charts as SVG text, for pages that need no script to be read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf"),
    *("#7f7f7f", "#bcbd22", "currentColor", "#aec7e8", "#98df8a"),
)
# In units of the picture: of what is drawn, of the room left of it and below, of a legend's letter.
PLOT, HEIGHT, LEFT, BOTTOM, LETTER = 458, 360, 52, 44, 6.2


@dataclass(frozen=True)
class Line:
    """Points (x, y) under a name; of one point a dot."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, inline: bool = False
) -> str:
    """An SVG of the lines with axes, grid and legend; ValueError where there is no point.

    A file of its own has a white ground; ``inline`` takes ground and text colour of its page.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        raise ValueError(f"{title}: nothing to draw")
    across, up = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    right, top, low = LEFT + PLOT, 28, HEIGHT - BOTTOM
    width = right + 40 + math.ceil(LETTER * max(14, *(len(line.name) for line in lines)))
    high = max(HEIGHT, top + 16 * len(lines) + 16)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - across[0]) / (across[-1] - across[0]) * (right - LEFT),
            low - (y - up[0]) / (up[-1] - up[0]) * (low - top),
        )

    ground = "" if inline else f'<rect width="{width}" height="{high}" fill="#fff"/>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {high}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="11" '
        'fill="currentColor">',
        ground,
        _text(LEFT, 16, title, "start"),
        _text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle"),
        f'<g transform="rotate(-90 12 {(low + top) / 2})">'
        + _text(12, (low + top) / 2, y_label, "middle")
        + "</g>",
    ]
    for x in across:
        px = at(x, up[0])[0]
        parts.append(f'<path d="M{px:.1f} {top}V{low}" stroke="#999" stroke-opacity=".35"/>')
        parts.append(_text(px, low + 15, f"{x:g}", "middle"))
    for y in up:
        py = at(across[0], y)[1]
        parts.append(f'<path d="M{LEFT} {py:.1f}H{right}" stroke="#999" stroke-opacity=".35"/>')
        parts.append(_text(LEFT - 5, py + 4, f"{y:g}", "end"))
    for i, line in enumerate(lines):
        colour, places = COLOURS[i % len(COLOURS)], [at(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="6 3"' if i >= len(COLOURS) else ""  # a colour's second line
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        y = top + 10 + 16 * i
        parts.append(f'<rect x="{right + 10}" y="{y - 8}" width="12" height="8" fill="{colour}"/>')
        parts.append(_text(right + 27, y, line.name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range, four to nine of them."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * k for k in (1, 2, 5, 10) if span / (step * k) <= 7)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
