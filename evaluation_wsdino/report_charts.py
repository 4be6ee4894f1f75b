"""Small charts for the report, drawn as SVG or HTML text: every label escaped, nothing fetched."""

import math
from html import escape

# Okabe and Ito's colours, told apart by readers with any common colour vision, then darker ones for a longer list.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5EA7", "#8C6D31",
    "#B2182B", "#4D4D4D", "#1B7837", "#DE77AE", "#35978F", "#A6761D", "#666699", "#99000D",
)  # fmt: skip
_SHAPES = ("circle", "square", "triangle", "diamond")


def colour(index):
    return PALETTE[index % len(PALETTE)]


def number(value, digits=3):
    """A number as a reader wants it: 0.0003, 12.4, 1,300; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value, digits=1):
    """A share in per cent; the space before the sign does not break."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%"


def ticks(low, high, count=5):
    """Round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def thin(xs, ys, most=300):
    """At most `most` points: the means of equal groups, so that noise is averaged and not picked."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None and math.isfinite(y)]
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def line_chart(title, series, x_label="step", band=None, share=False, legend=False):
    """A small line chart as one <figure>.

    Parameters
    ----------
    title : str
    series : list of (label, xs, ys, colour, style)
        style is "solid", "dashed" or "points".
    band : (x_low, x_high, label) or None
        A shaded window on the x axis.
    share : bool
        The values are shares, shown in per cent from 0 to 100.
    legend : bool
        Name even a single series.
    """
    series = [(label, thin(xs, ys), tint, style) for label, xs, ys, tint, style in series]
    series = [item for item in series if item[1]]
    if not series:
        return ""
    width, height, left, right, top, bottom = 360, 210, 56, 10, 10, 34
    all_x = [x for _, points, _, _ in series for x, _ in points]
    all_y = [y for _, points, _, _ in series for _, y in points]
    x_ticks = ticks(min(all_x), max(all_x), 4) if min(all_x) < max(all_x) else all_x[:1]
    y_ticks = [0, 0.25, 0.5, 0.75, 1] if share else ticks(min(all_y), max(all_y), 4)
    x_low, x_high = min(all_x), max(all_x)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x):
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y):
        return top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    if band is not None:
        start, end = px(max(band[0], x_low)), px(min(band[1], x_high))
        parts.append(
            f'<rect class="band" x="{start:.1f}" y="{top}" width="{max(end - start, 1):.1f}" '
            f'height="{height - top - bottom}"><title>{escape(band[2])}</title></rect>'
        )
    # As many digits as tell neighbours apart, also where the range is narrow against the level.
    digits = max(3, math.ceil(math.log10(max(map(abs, y_ticks)) / (y_ticks[1] - y_ticks[0]))) + 1)
    for tick in y_ticks:
        label = percent(tick, 0) if share else number(tick, digits)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(
                f'<text class="tick" x="{px(tick):.1f}" y="{height - 18}" text-anchor="middle">{number(tick)}</text>'
            )
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 3}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for label, points, tint, style in series:
        if style == "points" or len(points) == 1:
            for x, y in points:
                value = percent(y) if share else number(y, 4)
                parts.append(
                    f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{tint}">'
                    f"<title>{escape(label)}: {value} at {escape(x_label)} {number(x)}</title></circle>"
                )
        if len(points) > 1:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
            dash = ' stroke-dasharray="5 4"' if style == "dashed" else ""
            parts.append(f'<polyline class="curve" stroke="{tint}"{dash} points="{path}"><title>{escape(label)}')
            parts.append("</title></polyline>")
    parts.append("</svg>")
    named = legend or len(series) > 1
    items = legend_items([(label, tint, style) for label, _, tint, style in series]) if named else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}{items}</figure>"


def legend_items(items):
    """A legend: (label, colour, style) with style "dashed", a marker's shape, or anything else for a line."""
    entries = []
    for label, tint, style in items:
        if style in _SHAPES:
            swatch = f'<svg class="key" viewBox="-7 -7 14 14">{marker(0, 0, style, tint, 5)}</svg>'
        else:
            swatch = f'<i class="{"dash" if style == "dashed" else "dot"}" style="color:{tint}"></i>'
        entries.append(f"<li>{swatch}{escape(label)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def marker(x, y, shape, tint, size=4.5, attributes=""):
    if shape == "square":
        path = f"M{x - size:.1f},{y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z"
    elif shape == "triangle":
        path = f"M{x:.1f},{y - 1.2 * size:.1f}l{1.1 * size:.1f},{2.1 * size:.1f}h{-2.2 * size:.1f}z"
    elif shape == "diamond":
        path = f"M{x:.1f},{y - 1.3 * size:.1f}l{1.3 * size:.1f},{1.3 * size:.1f}l{-1.3 * size:.1f},{1.3 * size:.1f}"
        path += f"l{-1.3 * size:.1f},{-1.3 * size:.1f}z"
    else:
        r = 1.1 * size
        path = f"M{x - r:.1f},{y:.1f}a{r:.1f},{r:.1f} 0 1 0 {2 * r:.1f},0a{r:.1f},{r:.1f} 0 1 0 {-2 * r:.1f},0z"
    return f'<path d="{path}" fill="{tint}"{attributes}/>'


def category_styles(names):
    """`{name: (colour, shape)}`: a colour each, and a shape that changes too, so that neither alone is needed."""
    return {name: (colour(index), _SHAPES[index % len(_SHAPES)]) for index, name in enumerate(names)}


def scatter_map(points, categories):
    """A map of treatments with one legend and one colouring a category; the page's script switches between them.

    Parameters
    ----------
    points : list of dict
        x, y, label (hover text), and one name for each category.
    categories : list of (key, title, names in order)
    """
    size, margin = 620, 24
    xs, ys = [point["x"] for point in points], [point["y"] for point in points]
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    middle = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)

    def place(point):
        return tuple(
            size / 2 + (value - centre) / span * (size - 2 * margin)
            for value, centre in zip((point["x"], point["y"]), middle, strict=True)
        )

    styles = {key: category_styles(names) for key, _, names in categories}
    layers, legends, buttons = [], [], []
    for order, (key, title, names) in enumerate(categories):
        hidden = "" if order == 0 else " hidden"
        marks = []
        for point in points:
            x, y = place(point)
            tint, shape = styles[key][point[key]]
            tip = escape(point["label"])
            attributes = f' class="mark" data-tip="{tip}" data-group="{escape(point[key])}"'
            marks.append(marker(x, y, shape, tint, 5, attributes).replace("/>", f"><title>{tip}</title></path>"))
        style = ' style="display:none"' if order else ""
        layers.append(f'<g data-layer="{escape(key)}"{style}>{"".join(marks)}</g>')
        legend = legend_items([(name, *styles[key][name]) for name in names])
        legends.append(f'<div data-legend="{escape(key)}"{hidden}>{legend}</div>')
        pressed = "true" if order == 0 else "false"
        buttons.append(f'<button type="button" data-colour="{escape(key)}" aria-pressed="{pressed}">{escape(title)}')
        buttons.append("</button>")
    return (
        f'<div class="map"><p class="switch">Colour by {"".join(buttons)}</p><div class="mapbox">'
        f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="Map of treatments">{"".join(layers)}</svg>'
        f'<div class="maplegend">{"".join(legends)}</div></div></div>'
    )


def bars(rows, legend=()):
    """Horizontal bars as an HTML table: rows of (label, [(share or None, text, colour), ...])."""
    body = []
    for label, values in rows:
        cells = "".join(
            f'<div class="bar"><span class="track"><span style="width:{100 * (share or 0):.1f}%;background:{tint}">'
            f'</span></span><span class="value">{escape(text)}</span></div>'
            for share, text, tint in values
        )
        body.append(f'<tr><th scope="row">{escape(label)}</th><td>{cells}</td></tr>')
    key = legend_items([(label, tint, "line") for label, tint in legend]) if legend else ""
    return f'{key}<table class="bars">{"".join(body)}</table>'


def confusion_table(names, matrix, caption):
    """Counts as a table, rows the true class; columns are numbered as the rows are, so that it fits a phone."""
    head = "".join(f'<th scope="col" title="{escape(name)}">{index}</th>' for index, name in enumerate(names, 1))
    rows = []
    for index, (name, counts) in enumerate(zip(names, matrix, strict=True), 1):
        total = sum(counts)
        cells = []
        for column, count in enumerate(counts):
            share = count / total if total else 0
            kind = "right" if column == index - 1 else "wrong"
            title = f"{name} taken for {names[column]}: {count} of {total}"
            inverted = " dark" if share > 0.55 else ""
            cells.append(
                f'<td class="{kind}{inverted}" style="--share:{share:.3f}" title="{escape(title)}">{count or ""}</td>'
            )
        rows.append(f'<tr><th scope="row">{index} {escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="confusion"><caption>{escape(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
