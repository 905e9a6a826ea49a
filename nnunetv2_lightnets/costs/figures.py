"""The chart of a benchmark: one cost, or a score, against another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from nnunetv2_lightnets.pages.figures import COLOURS, GREY, WIDTH, axes_of


def pareto(
    names: Sequence[str], x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, *, more_is_better: bool
) -> Figure:
    """Cost ``x``, on a logarithmic axis, against ``y``; results that no other one beats in both are filled and joined.

    ``y`` is a score if ``more_is_better``, else another cost, on a logarithmic axis as well. The names, short ones,
    stand beside the points.
    """
    goodness = np.asarray(y) if more_is_better else -np.asarray(y)
    front, best = [], -np.inf
    for i in np.lexsort((-goodness, np.asarray(x))):
        if goodness[i] > best:
            front.append(int(i))
            best = goodness[i]
    height = max(2.9, 0.9 + 0.16 * len(names))
    figure, axes = axes_of(WIDTH, height)
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
            names[i],
            (x[i], y[i]),
            xytext=(1.06, at),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
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


def _spread_out(wanted: Sequence[float] | NDArray[np.float64], gap: float) -> list[float]:
    """Heights of labels up to 1, near the wanted ones and in their order, ``gap`` apart from each other."""
    order = np.argsort(wanted, kind="stable")
    at = np.asarray(wanted, dtype=np.float64)[order].copy()
    for k in range(1, len(at)):
        at[k] = max(at[k], at[k - 1] + gap)
    at[-1] = min(at[-1], 1.0)
    for k in range(len(at) - 2, -1, -1):
        at[k] = min(at[k], at[k + 1] - gap)
    places = np.empty(len(at))
    places[order] = at
    return [float(place) for place in places]
