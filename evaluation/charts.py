"""Drawings as SVG text: curves of a run, reliability diagrams, and bars with intervals.

Shapes carry classes, to which charts.css gives their colours, in the page of a report as in a lone curves.svg. Series 0
and 1 differ in their marks or dashes too, not in colour alone. Text that comes from elsewhere passes through
html.escape.
"""

import math
import re
from html import escape
from pathlib import Path

# a and b, of series 0 and 1: Okabe and Ito's blue and orange, which colour-blind readers can tell apart; the orange is
# darker on light paper, for contrast
LIGHT = dict(fg="#1b1f24", dim="#59636e", bg="#fff", card="#f5f7f9", line="#d4dae0", a="#0072b2", b="#b35900")
DARK = dict(fg="#e6edf3", dim="#9aa5b1", bg="#101418", card="#191f26", line="#343d48", a="#56b4e9", b="#e69f00")
CURVE_MARKS = "—╌"  # of series 0, of series 1, which is dashed
MAX_MARKED = 30  # points of a curve that are marked: more would hide it
CELL = (420, 264)  # of a figure on a sheet, with its legend

Figure = tuple[list[str], str]  # the names of one or two series, and their plot

# A plot is 412 x 236 units; its axes span these x, and these y from bottom to top.
X, Y = (50, 390), (190, 24)


def style() -> str:
    """The drawings' CSS. Its variables are the names in LIGHT and DARK."""
    return (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose a range."""
    rough = (high - low or abs(high) or 1) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(first + 1, last) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose a range of positive numbers, for a logarithmic axis: powers of ten, with 2 and 5 times
    these below three decades. A range within a factor of two has the numbers of `ticks`, which are above 0 there."""
    if high < 2 * low:
        return ticks(low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    numbers = [m * 10.0**k for k in range(first, last) for m in steps] + [10.0**last]
    start = max(i for i, number in enumerate(numbers) if number <= low * (1 + 1e-9))
    end = min(i for i, number in enumerate(numbers) if number >= high * (1 - 1e-9))
    return numbers[start : end + 1]


def label(value: float) -> str:
    """A number at an axis, as short as the margins have room for: 200, 12.5k, 2e-4."""
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k"
    if not size or size >= 0.001:
        return f"{value:,g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def along(axis: list[float], value: float, span: tuple[int, int], log: bool = False) -> float:
    """The coordinate of a value on an axis that is drawn over `span`."""
    start, end = span
    low, high, value = map(math.log, (axis[0], axis[-1], value)) if log else (axis[0], axis[-1], value)
    return round(start + (end - start) * (value - low) / (high - low), 1)


def plot(xs: list[float], ys: list[float], x_name: str, description: str, shapes: str, log: bool = False) -> str:
    """Shapes in axes with the ticks `xs` and `ys`, these logarithmic with `log`. `description` is the alternative
    text."""
    axes = ""
    for y in ys:
        place = along(ys, y, Y, log)
        axes += f'<path class="rule" d="M{X[0]} {place}H{X[1]}"/>'
        axes += f'<text x="44" y="{place + 4}" text-anchor="end">{label(y)}</text>'
    for x in xs:
        axes += f'<text x="{along(xs, x, X)}" y="208" text-anchor="middle">{label(x)}</text>'
    axes += f'<text x="220" y="230" text-anchor="middle">{x_name}</text>'
    return f'<svg viewBox="0 0 412 236" role="img" aria-label="{escape(description)}">{axes}{shapes}</svg>'


def line_chart(series: dict[str, list[tuple[float, float]]], mark: int, log: bool = False) -> list[Figure]:
    """A figure of one or two series against steps, and a dashed line at step `mark`. Empty where there are no points.
    With `log` values are on a logarithmic axis, unless one is 0 or below. Only short curves have marked points."""
    points = [point for line in series.values() for point in line]
    if not points:
        return []
    low, high = min(y for _, y in points), max(y for _, y in points)
    log = log and low > 0
    xs, ys = ticks(0, max(x for x, _ in points)), (log_ticks if log else ticks)(low, high)
    shapes = f'<path class="dashed" d="M{along(xs, mark, X)} {Y[1]}V{Y[0]}"/>' if 0 < mark <= xs[-1] else ""
    for number, line in enumerate(series.values()):
        places = [(along(xs, x, X), along(ys, y, Y, log)) for x, y in line]
        shapes += f'<polyline class="k{number}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
        if len(places) <= MAX_MARKED:
            shapes += "".join(f'<circle class="k{number}" cx="{x}" cy="{y}" r="3"/>' for x, y in places)
    description = "; ".join(f"{k} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for k, line in series.items() if line)
    return [(list(series), plot(xs, ys, "step (loss on a log axis)" if log else "step", description, shapes, log))]


def curves(metrics: list[dict], mark: int = 0) -> list[Figure]:
    """Losses, exact match and learning rate from the lines of metrics.jsonl, with a dashed line at step `mark`."""

    def series(event: str, field: str, scale: float = 1) -> list[tuple[float, float]]:
        points = [(line["step"], scale * line[field]) for line in metrics if line["event"] == event]
        return [point for point in points if math.isfinite(point[1])]

    losses = {"training loss": series("train", "loss"), "validation loss": series("eval", "loss")}
    exact_match = {"validation exact match, %": series("eval", "exact_match", 100)}
    learning_rate = {"learning rate": series("train", "lr")}
    return line_chart(losses, mark, log=True) + line_chart(exact_match, mark) + line_chart(learning_rate, mark)


def sheet(figures: list[Figure]) -> str:
    """Figures, each under the names of its series, as one SVG file that needs no page around it: side by side, and one
    below the other in a narrow window."""
    (width, height), count = CELL, len(figures)
    body = stacked = ""
    for number, (names, plotted) in enumerate(figures):
        labels = "".join(
            f'<tspan class="k{i}" dx="{8 * i}">{CURVE_MARKS[i]} {escape(name)}</tspan>' for i, name in enumerate(names)
        )
        body += f'<g class="f{number}" transform="translate({width * number} 0)"><text x="50" y="20">{labels}</text>'
        body += f'<svg y="24" width="412" height="236">{plotted}</svg></g>'
        # In units of the view box, which is `count` cells wide, a cell that fills the window is `count` times as large.
        stacked += f".f{number}{{transform:translate(0,{height * count * number}px) scale({count})}}"
    # An image in a page keeps the proportions of the view box, so only a window that is high enough stacks them.
    narrow = f"svg:root{{width:100%;height:{100 * count * height / width:.2f}vw}}{stacked}"
    narrow = f"@media (max-width:800px) and (max-aspect-ratio:3/2){{{narrow}}}"
    light, dark = (_without_variables(style(), colours) for colours in (LIGHT, DARK))
    size = f'viewBox="0 0 {width * count} {height}" width="{width * count}" height="{height}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} preserveAspectRatio="xMinYMin">
<style>{light}@media (prefers-color-scheme:dark){{{dark}}}{narrow}</style>
<rect class="paper" width="100%" height="100%"/>
{body}</svg>
"""


def _without_variables(css: str, colours: dict[str, str]) -> str:
    """CSS with its colours written out: not every viewer of SVG files knows CSS variables."""
    return re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], css)


def reliability(bins: list[dict]) -> str:
    """Bins of `statistics.calibration_bins`: the share right as a bar with the number of answers on top, and a dot at
    the mean confidence."""
    axis, description = [k / 10 for k in range(11)], "share right: "
    shapes = f'<path class="dashed" d="M{X[0]} {Y[0]}L{X[1]} {Y[1]}"/>'  # where confidence equals the share right
    for b in bins:
        x, top, confidence = along(axis, b["low"], X), along(axis, b["accuracy"], Y), b["confidence"]
        shapes += f'<path class="span k0" d="M{x + 1} {Y[0]}V{top}h32V{Y[0]}z"/>'
        shapes += f'<circle class="k0" cx="{along(axis, confidence, X)}" cy="{top}" r="3.5"/>'
        shapes += f'<text class="count" x="{x + 17}" y="14" text-anchor="middle">{b["questions"]}</text>'
        description += f"{b['accuracy']:.2f} of {b['questions']} at confidence {confidence:.2f}; "
    return plot(axis, axis[::2], "confidence", description, shapes)


def bars(means: list[dict]) -> str:
    """Means with their intervals from 0 to 100%, one line for each model. The numbers stand beside it, so it is hidden
    from screen readers."""
    height = 12 * len(means)
    shapes = f'<path class="rule" d="M0 0V{height}m80 0V0m80 0V{height}"/>'
    for number, mean in enumerate(means):
        low, middle, high = (round(160 * mean[end], 1) for end in ("low", "mean", "high"))
        y = 12 * number
        shapes += f'<g class="k{number}"><path class="span" d="M{low} {y + 1}H{high}v10H{low}z"/>'
        shapes += f'<path d="M{middle - 2} {y + 4}h4v4h-4z"/>' if number else f'<circle cx="{middle}" cy="6" r="2"/>'
        shapes += "</g>"
    box = f'viewBox="-4 0 168 {height}" width="168" height="{height}"'
    return f'<svg class="bars" {box} aria-hidden="true">{shapes}</svg>'
