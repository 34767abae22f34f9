"""Charts as SVG that stands inside a page: the page's own colours and fonts, and the same bytes for the same numbers.

Text of the data never gets in here: charts are labelled by words of the code, and the page names everything else.
"""

import hashlib
import io
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

Points = Sequence[float]

SIZE = (5.2, 2.7)  # inches, at which text is as large as that of a phone's page
# What is drawn in these colours is shown in the page's, which differ by light and dark.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = [f"#0a0a{number:02x}" for number in range(1, 9)]
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {code: f"c{i}" for i, code in enumerate(SERIES, 1)}
DASHES = ["-", "--", ":", "-."]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sft_jax",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


class Curve(NamedTuple):
    """Values over steps."""

    name: str
    steps: Sequence[int]
    values: Points


class Chart(NamedTuple):
    """A picture, what it is called, and what it shows in words."""

    title: str
    text: str
    svg: Markup
    legend: list[tuple[str, int]]  # name, and number of the colour; empty where one line needs none


def curves(title: str, text: str, found: Sequence[Curve], mark: int | None = None) -> Chart | None:
    """Lines over steps, few points as dots; `mark` is a step that is pointed out. None where there is nothing."""
    looks = {number: curve for number, curve in enumerate(found) if curve.steps}
    if not looks:
        return None

    def draw(axes: Any) -> None:
        for number, curve in looks.items():
            values = np.asarray(curve.values, float)
            values[~np.isfinite(values)] = np.nan
            colour, dash = SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]
            axes.plot(curve.steps, values, color=colour, linestyle=dash, marker="o" if len(values) <= 40 else "")
        if mark is not None:
            axes.axvline(mark, color=MUTED, linestyle=":", linewidth=1.2)
        axes.set_xlabel("step")

    legend = [(curve.name, number % len(SERIES) + 1) for number, curve in looks.items()]
    return Chart(title, text, picture(draw), legend if len(found) > 1 else [])


def reliability(title: str, text: str, bins: Sequence[dict[str, Any]]) -> Chart:
    """The share right against the confidence, equal on the diagonal; dots grow with their rows."""

    def draw(axes: Any) -> None:
        most = max(b["rows"] for b in bins)
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
        x, y = [b["confidence"] for b in bins], [b["right"] for b in bins]
        axes.plot(x, y, color=SERIES[0])
        axes.scatter(x, y, s=[12 + 90 * b["rows"] / most for b in bins], color=SERIES[0], zorder=3)
        axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1.03), ylim=(0, 1.03))

    return Chart(title, text, picture(draw), [])


def by_length(title: str, text: str, parts: Sequence[dict[str, Any]], score: str) -> Chart:
    """A score by ranges of length, with its standard error."""

    def draw(axes: Any) -> None:
        places = range(len(parts))
        values, errors = [p["score"] for p in parts], [p["error"] for p in parts]
        axes.errorbar(places, values, errors, color=SERIES[0], marker="o", capsize=3, elinewidth=1)
        names = [f"{p['from']}–{p['to']}" if p["from"] < p["to"] else str(p["from"]) for p in parts]
        axes.set_xticks(places, names, rotation=30 if len(parts) > 5 else 0)
        axes.set(xlabel="tokens", ylabel=score)

    return Chart(title, text, picture(draw), [])


def scatter(title: str, text: str, truth: Points, predicted: Points) -> Chart:
    """Predicted numbers against true ones; right ones are on the diagonal."""

    def draw(axes: Any) -> None:
        ends = [min(*truth, *predicted), max(*truth, *predicted)]
        axes.plot(ends, ends, color=MUTED, linestyle="--", linewidth=1)
        axes.plot(truth, predicted, "o", color=SERIES[0], alpha=0.4, markersize=3.5, markeredgewidth=0)
        axes.set(xlabel="truth", ylabel="prediction")

    return Chart(title, text, picture(draw), [])


def histogram(title: str, text: str, edges: Points, rows: Points) -> Chart:
    """How many rows there are between the edges."""

    def draw(axes: Any) -> None:
        axes.stairs(rows, edges, fill=True, color=SERIES[0], alpha=0.75)
        axes.axvline(0, color=MUTED, linestyle=":", linewidth=1.2)
        axes.set(xlabel="prediction minus truth", ylabel="rows")

    return Chart(title, text, picture(draw), [])


def picture(draw: Callable[[Any], None]) -> Markup:
    """What is drawn on the axes, as an `<svg>` element."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would tell of building a cache of fonts
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with rc_context(STYLE):
        sheet = Figure(SIZE, layout="constrained")
        FigureCanvasSVG(sheet)
        draw(sheet.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        sheet.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _inline(drawn.getvalue())


def _inline(svg: str) -> Markup:
    """The element alone, with ids that no other chart of the page has, in the colours and the font of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    for code, name in VARIABLES.items():
        body = body.replace(code, f"var(--{name})")
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    # The name of a chart's ids is made of what it shows, so that it is the same whenever that is.
    prefix = f"k{hashlib.sha256(body.encode()).hexdigest()[:8]}-"
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", body).replace("xlink:href", "href")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Markup(f'<svg {box[0] if box else ""} aria-hidden="true">{body.rstrip()}')
