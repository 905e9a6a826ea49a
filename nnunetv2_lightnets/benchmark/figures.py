"""Charts: differences with their intervals, spread of scores, case against case, scores and seconds against costs.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and shapes differ as well, for print. Charts are
as wide as a phone, so that their letters stay readable there; the page puts them side by side where there is room.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from nnunetv2_lightnets.benchmark.analysis import Table

# Okabe and Ito 2008, without black (the truth is black) and yellow (it fades on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#595959"
WIDTH = 4.4  # inches
_MANY_POINTS = 1500  # more of them make an SVG heavy
_LABELLED_HEIGHT = 200  # points, about, of the square of case_against_case
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.labelsize": 9,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "nnunetv2_lightnets",  # equal numbers, equal file
}


def short(name: str, length: int = 24) -> str:
    """A name that fits beside a chart; nnU-Net's prefix goes first, then the middle."""
    name = re.sub(r"^nnUNetTrainer(?=.)", "", name)
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element that grows and shrinks with the page."""
    out = io.StringIO()
    FigureCanvasSVG(figure)
    with mpl.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\n?", "", text[text.index("<svg") :], flags=re.DOTALL)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{opening} role="img" aria-label="{label}" style="max-width:{figure.get_figwidth() * 96:.0f}px">{rest}'


def png(figure: Figure, dpi: int = 144) -> str:
    """The figure as a ``data:`` address."""
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def forest(tables: Sequence[Table], reference: str, margin: float) -> Figure:
    """Mean paired differences from the reference result with 95 % intervals, and the margin as a line.

    Args:
        tables: of one metric; each becomes a group of rows.
        reference: name of the reference result.
        margin: of non-inferiority.
    """
    names = [d.result for d in tables[0].differences]
    rows = len(tables) * (len(names) + (len(names) > 1))
    figure, axes = _axes(WIDTH, 1.2 + 0.24 * rows)
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for table in tables:
        if len(names) > 1:
            axes.text(
                0,
                y,
                table.title,
                transform=blended_transform_factory(axes.transAxes, axes.transData),
                va="center",
                weight="bold",
            )
            y += 1
        for j, difference in enumerate(table.differences):
            colour, marker = COLOURS[(j + 1) % len(COLOURS)], MARKERS[(j + 1) % len(MARKERS)]
            if difference.interval is not None:
                axes.plot([difference.interval.low, difference.interval.high], [y, y], color=colour, lw=1.8)
            axes.plot(difference.mean, y, marker, color=colour, ms=5.5)
            ticks.append((y, short(difference.result) if len(names) > 1 else table.title))
            y += 1
    axes.axvline(0, color="black", lw=0.9, zorder=0)
    axes.axvline(-margin, color=GREY, lw=0.9, ls="--", zorder=0)
    axes.annotate(
        f"margin −{margin:g}",
        (-margin, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=GREY,
        fontsize=8,
    )
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#e5e5e5", lw=0.7)
    axes.set_xlabel(f"{tables[0].metric}, difference from {short(reference)}")
    return figure


def spread(table: Table) -> Figure:
    """Every case (or subject) of every result as a point, quartiles as a box, the mean as a bar."""
    names = [score.result for score in table.scores]
    figure, axes = _axes(WIDTH, 0.9 + 0.5 * len(names))
    rng = np.random.default_rng(0)
    for j in range(len(names)):
        values = table.values[:, j]
        colour, marker = COLOURS[j % len(COLOURS)], MARKERS[j % len(MARKERS)]
        jitter = rng.uniform(-0.22, 0.22, len(values))
        axes.plot(
            values, j + jitter, marker, color=colour, ms=4, alpha=0.45, mew=0, rasterized=len(values) > _MANY_POINTS
        )
        axes.boxplot(
            [values],
            positions=[j],
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            manage_ticks=False,
            medianprops={"color": "black", "lw": 1.2},
            boxprops={"lw": 0.9},
            whiskerprops={"lw": 0.9},
            showcaps=False,
        )
        axes.plot(values.mean(), j, "|", color="black", ms=20, mew=2.4)
        axes.plot(values.mean(), j, "|", color=colour, ms=17, mew=1.2)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#e5e5e5", lw=0.7)
    axes.set_xlabel(f"{table.metric}, {table.title}")
    return figure


def case_against_case(table: Table, index: int) -> Figure:
    """Every case: the reference result's score against that of result ``index``; below the line it lost."""
    reference, result = (table.scores[j].result for j in (0, index))
    x, y = table.values[:, 0], table.values[:, index]
    figure, axes = _axes(WIDTH * 0.8, WIDTH * 0.8)
    low = float(min(x.min(), y.min()))
    low -= 0.04 * max(1 - low, 0.02)
    high = 1 + 0.04 * (1 - low)
    axes.plot([low, high], [low, high], color="black", lw=0.9, zorder=0)
    axes.plot(
        x,
        y,
        MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        ms=4,
        alpha=0.55,
        mew=0,
        rasterized=len(x) > _MANY_POINTS,
    )
    worst = [i for i in np.argsort(y - x, kind="stable")[:3] if y[i] < x[i]]
    points = _LABELLED_HEIGHT / (high - low)  # per unit of the score
    above = np.inf
    for i in sorted(worst, key=lambda i: -y[i]):
        left = x[i] > (low + high) / 2
        at = min(y[i] * points, above - 9)  # points; labels must not cover each other
        above = at
        axes.annotate(
            short(table.units[i], 16),
            (x[i], y[i]),
            xytext=(-6 if left else 6, at - y[i] * points),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=7.5,
            color=GREY,
        )
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.spines["left"].set_visible(True)
    axes.locator_params(nbins=5)
    axes.grid(color="#e5e5e5", lw=0.7)
    axes.set_xlabel(f"{table.metric} of {short(reference)}")
    axes.set_ylabel(f"{table.metric} of {short(result)}")
    return figure


def pareto(
    names: Sequence[str], x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, *, more_is_better: bool
) -> Figure:
    """Cost ``x``, on a logarithmic axis, against ``y``; results that no other one beats in both are filled and joined.

    Args:
        names: of the results, written beside the points.
        x: cost, less is better.
        y: another cost (logarithmic axis), or a score.
        x_label: axis label.
        y_label: axis label.
        more_is_better: whether ``y`` is a score.
    """
    goodness = np.asarray(y) if more_is_better else -np.asarray(y)
    order = np.lexsort((-goodness, np.asarray(x)))
    front, best = [], -np.inf
    for i in order:
        if goodness[i] > best:
            front.append(int(i))
            best = goodness[i]
    height = max(2.9, 0.9 + 0.16 * len(names))
    figure, axes = _axes(WIDTH, height)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis, x)
    axes.set_xlim(*_limits(x, logarithmic=True))
    if not more_is_better:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, y)
    low, high = _limits(y, logarithmic=not more_is_better)
    axes.set_ylim(low, high)
    axes.spines["left"].set_visible(True)
    axes.plot([x[i] for i in front], [y[i] for i in front], color=COLOURS[0], lw=1, alpha=0.6, zorder=1)
    for i in range(len(names)):
        face = COLOURS[0] if i in front else "white"
        axes.plot(x[i], y[i], "o", ms=6, mfc=face, mec=COLOURS[0] if i in front else GREY, mew=1.1, zorder=2)
    axes.grid(color="#e5e5e5", lw=0.7)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    scale = np.asarray if more_is_better else np.log
    shares = (scale(y) - scale(low)) / (scale(high) - scale(low))
    line = 10.5 / ((height - 0.6) * 72)  # a line of text, as a share of the axes' height
    for i, at in enumerate(_spread_out(shares, line)):
        axes.annotate(
            short(names[i]),
            (x[i], y[i]),
            xytext=(1.06, at),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            weight="bold" if i in front else "normal",
            arrowprops={
                "arrowstyle": "-", "color": "#b5b5b5", "lw": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)
            },
        )  # fmt: skip
    return figure


def _limits(values: Sequence[float], *, logarithmic: bool) -> tuple[float, float]:
    """Limits of an axis that leave some room around the values."""
    ends = np.array([min(values), max(values)], dtype=np.float64)
    ends = np.log(ends) if logarithmic else ends
    room = 0.07 * float(np.ptp(ends)) or 0.05 * abs(float(ends[0])) or 1.0
    low, high = float(ends[0]) - room, float(ends[1]) + room
    return (float(np.exp(low)), float(np.exp(high))) if logarithmic else (low, high)


def _plain_numbers(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis, more of them where it is short."""
    decades = np.log10(max(values) / min(values))
    many = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,))
    axis.set_major_locator(many if decades > 0.7 else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _spread_out(shares: Sequence[float] | NDArray[np.float64], line: float) -> list[float]:
    """Heights of labels, near the wanted ones in the same order, a line apart from each other."""
    order = np.argsort(shares, kind="stable")
    at = np.asarray(shares, dtype=np.float64)[order].copy()
    for k in range(1, len(at)):
        at[k] = max(at[k], at[k - 1] + line)
    at[-1] = min(at[-1], 1.0)
    for k in range(len(at) - 2, -1, -1):
        at[k] = min(at[k], at[k + 1] - line)
    heights = np.empty(len(at))
    heights[order] = at
    return [float(height) for height in heights]
