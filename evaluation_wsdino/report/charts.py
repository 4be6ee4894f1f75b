"""Where the points, ticks and curves of the page's charts lie; `charts.html` draws them as SVG."""

import math
from collections.abc import Iterable, Sequence

# Okabe and Ito's colours, which readers with any common colour vision tell apart, then darker ones for a longer list.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5EA7", "#8C6D31",
    "#B2182B", "#4D4D4D", "#1B7837", "#DE77AE", "#35978F", "#A6761D", "#666699", "#99000D",
)  # fmt: skip
# Outlines of the map's markers around the origin, about 10 pixels wide.
SHAPES = (
    "M-5.5,0a5.5,5.5 0 1 0 11,0a5.5,5.5 0 1 0 -11,0z",
    "M-5,-5h10v10h-10z",
    "M0,-6l5.5,10.5h-11z",
    "M0,-6.5l6.5,6.5l-6.5,6.5l-6.5,-6.5z",
)
# The plotting area of a line chart in a picture of 360 x 210, and the side of the map with its margin.
LEFT, RIGHT, TOP, BOTTOM = 56, 350, 10, 176
MAP_SIZE, MAP_MARGIN = 620, 24


def colour(index: int) -> str:
    """Colour of the entry `index` of a list, from the first again after the last."""
    return PALETTE[index % len(PALETTE)]


def number(value: float | None, digits: int = 3) -> str:
    """A number as a reader wants it: 0.0003, 12.4, 1,300; a dash for None and nan."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent; the space before the sign does not break."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def thin(points: Iterable[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most `most` points: means of equal groups of the finite ones, so that noise is averaged and not picked."""
    points = [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(y)]
    size = math.ceil(len(points) / most) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def line_chart(title: str, series: Sequence[tuple], *, x_label: str = "step", share: bool = False) -> dict | None:
    """What the macro `line_chart` draws, or None where there is no point.

    Parameters
    ----------
    series : sequence of (label, points, colour, dashed)
        points are (x, y).
    share : bool
        The values are shares, shown in per cent from 0 to 100.
    """
    series = [(label, thin(points), tint, dashed) for label, points, tint, dashed in series]
    series = [one for one in series if one[1]]
    if not series:
        return None
    xs = [x for _, points, _, _ in series for x, _ in points]
    ys = [y for _, points, _, _ in series for _, y in points]
    x_low, x_high = min(xs), max(xs)
    x_ticks = [tick for tick in ticks(x_low, x_high, 4) if x_low <= tick <= x_high] if x_low < x_high else [x_low]
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_ticks = [0, 0.25, 0.5, 0.75, 1] if share else ticks(min(ys), max(ys), 4)
    # As many digits as tell neighbours apart, also where the range is narrow against the level.
    digits = max(3, math.ceil(math.log10(max(map(abs, y_ticks)) / (y_ticks[1] - y_ticks[0]))) + 1)

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def down(y: float) -> float:
        return round(TOP + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * (BOTTOM - TOP), 1)

    curves = []
    for label, points, tint, dashed in series:
        value = percent(points[0][1]) if share else number(points[0][1], 4)
        single = f"{label}: {value} at {x_label} {number(points[0][0])}" if len(points) == 1 else ""
        places = [(across(x), down(y)) for x, y in points]
        curves.append({"label": label, "places": places, "colour": tint, "dashed": dashed, "single": single})
    return {
        "title": title,
        "x_label": x_label,
        "x_ticks": [(across(tick), number(tick)) for tick in x_ticks],
        "y_ticks": [(down(tick), percent(tick, 0) if share else number(tick, digits)) for tick in y_ticks],
        "curves": curves,
    }


def scatter_map(points: Sequence[dict], categories: Sequence[tuple[str, str, Sequence[str]]]) -> dict:
    """What the macro `scatter_map` draws: a map of treatments, coloured by one category at a time.

    Parameters
    ----------
    points : sequence of dict
        x, y, label (hover text), and one name for each category.
    categories : sequence of (key, title, names in order)
        A name has a colour and also a shape, so that neither alone is needed.
    """
    xs, ys = [point["x"] for point in points], [point["y"] for point in points]
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0

    def place(value: float, values: Sequence[float]) -> float:
        middle = (max(values) + min(values)) / 2
        return round(MAP_SIZE / 2 + (value - middle) / span * (MAP_SIZE - 2 * MAP_MARGIN), 1)

    placed = [point | {"x": place(point["x"], xs), "y": place(point["y"], ys)} for point in points]
    styles = {
        key: {name: (colour(index), SHAPES[index % len(SHAPES)]) for index, name in enumerate(names)}
        for key, _, names in categories
    }
    return {"size": MAP_SIZE, "points": placed, "categories": [(key, title) for key, title, _ in categories],
            "styles": styles}  # fmt: skip
