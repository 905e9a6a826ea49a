"""Charts of a comparison: differences with their intervals, spread of scores, case against case.

All take the tables of a comparison, and ``labels``: what to call each result in a chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from nnunetv2_lightnets.comparison.findings import Difference, Table
from nnunetv2_lightnets.comparison.statistics import Interval
from nnunetv2_lightnets.pages.figures import GREY, HALO, WIDTH, axes_of, series
from nnunetv2_lightnets.pages.text import signed

_MANY_POINTS = 1500  # more of them make an SVG heavy
_BESIDE = ((8, 0), (-2, -9), (2, 9))  # points from a circle to its number, apart also where circles coincide
_MARGINS_SHOWN = 8  # either side of 0, in a chart whose largest difference is more than twice as far


def forest(tables: Sequence[Table], labels: Mapping[str, str], margin: float) -> Figure:
    """Mean paired differences from the reference result with 95 % intervals, and the non-inferiority margin as a line.

    Each table, all of one metric, becomes a group of rows. The axis keeps to the neighbourhood of the margin, in which
    the question is decided: arrows with numbers stand for differences that lie far beyond it.
    """
    several = len(tables[0].differences) > 1
    rows = len(tables) * (len(tables[0].differences) + several)
    figure, axes = axes_of(WIDTH, 1.2 + 0.24 * rows)
    low, high = _shown(tables, margin)
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for table in tables:
        if several:
            across = blended_transform_factory(axes.transAxes, axes.transData)
            axes.text(0, y, table.title, transform=across, va="center", weight="bold")
            y += 1
        for j, difference in enumerate(table.differences, start=1):
            _difference(axes, difference, j, y, low, high)
            ticks.append((y, labels[difference.result] if several else table.title))
            y += 1
    axes.axvline(0, color="black", lw=0.9, zorder=0)
    axes.axvline(-margin, color=GREY, lw=0.9, ls="--", zorder=0)
    above = {"xycoords": ("data", "axes fraction"), "va": "bottom", "color": GREY}
    _write(axes, f"margin −{margin:g}", (-margin, 1), (0, 2), **above)
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -0.6)
    room = 0.08 * (high - low)
    axes.set_xlim(low - room, high + room)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#e5e5e5", lw=0.7)
    axes.set_xlabel(f"{tables[0].metric}, difference from {labels[tables[0].scores[0].result]}")
    return figure


def _shown(tables: Sequence[Table], margin: float) -> tuple[float, float]:
    """Ends of the axis of differences: all of them, or a neighbourhood of the margin where some are far away."""
    ends = [d.mean for table in tables for d in table.differences]
    intervals = [d.interval for table in tables for d in table.differences if d.interval]
    ends += [end for interval in intervals for end in (interval.low, interval.high)]
    low, high = min(*ends, -margin), max(*ends, 0.0)
    around = _MARGINS_SHOWN * margin
    return (-around if low < -2 * around else low), (around if high > 2 * around else high)


def _difference(axes: Axes, difference: Difference, index: int, y: float, low: float, high: float) -> None:
    """One row: the mean with its interval. An arrow stands for what is beyond the axis, a number for such a mean."""
    colour, marker = series(index)
    interval = difference.interval or Interval(difference.mean, difference.mean)
    for end, outside, arrow in ((low, interval.low < low, "<"), (high, interval.high > high, ">")):
        if outside:
            axes.plot(end, y, arrow, color=colour, ms=5.5)
    if not low <= difference.mean <= high:
        left = difference.mean < low
        end, offset, aligned = (low, 7, "left") if left else (high, -7, "right")
        _write(axes, signed(difference.mean, 2), (end, y), (offset, 0), ha=aligned)
        return
    axes.plot(np.clip([interval.low, interval.high], low, high), [y, y], color=colour, lw=1.8)
    axes.plot(difference.mean, y, marker, color=colour, ms=5.5)


def _write(axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], **how: Any) -> None:
    """Small text, ``offset`` points away from a place."""
    aligned: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=8, **aligned | how)


def spread(table: Table, labels: Mapping[str, str]) -> Figure:
    """Every case (or subject) of every result as a point, quartiles as a box, the mean as a bar."""
    names = [labels[score.result] for score in table.scores]
    figure, axes = axes_of(WIDTH, 0.9 + 0.5 * len(names))
    rng = np.random.default_rng(0)
    for j, values in enumerate(table.values.T):
        colour, marker = series(j)
        jitter = rng.uniform(-0.22, 0.22, len(values))
        many = len(values) > _MANY_POINTS
        axes.plot(values, j + jitter, marker, color=colour, ms=4, alpha=0.45, mew=0, rasterized=many)
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
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#e5e5e5", lw=0.7)
    axes.set_xlabel(f"{table.metric}, {table.title}")
    return figure


def case_against_case(table: Table, index: int, labels: Mapping[str, str]) -> Figure:
    """Every case: the reference result's score against that of result ``index``; below the line it lost.

    Its worst cases have a circle and a number, in the order of :func:`worst_units`.
    """
    reference, result = (labels[table.scores[j].result] for j in (0, index))
    x, y = table.values[:, 0], table.values[:, index]
    figure, axes = axes_of(WIDTH * 0.8, WIDTH * 0.8)
    low = float(min(x.min(), y.min()))
    low -= 0.04 * max(1 - low, 0.02)
    high = 1 + 0.04 * (1 - low)
    axes.plot([low, high], [low, high], color="black", lw=0.9, zorder=0.9)
    colour, marker = series(index)
    axes.plot(x, y, marker, color=colour, ms=4, alpha=0.55, mew=0, rasterized=len(x) > _MANY_POINTS)
    for place, (i, offset) in enumerate(zip(worst_units(table, index), _BESIDE, strict=False), start=1):
        axes.plot(x[i], y[i], "o", ms=9, mfc="none", mec=GREY, mew=0.9)
        _write(axes, str(place), (x[i], y[i]), offset, path_effects=HALO)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.spines["left"].set_visible(True)
    axes.locator_params(nbins=5)
    axes.grid(color="#e5e5e5", lw=0.7)
    axes.set_xlabel(f"{table.metric} of {reference}")
    axes.set_ylabel(f"{table.metric} of {result}")
    return figure


def worst_units(table: Table, index: int) -> list[int]:
    """Places in ``table.units`` of the three cases in which result ``index`` loses most, the worst first."""
    losses = table.values[:, index] - table.values[:, 0]
    return [int(i) for i in np.argsort(losses, kind="stable")[:3] if losses[i] < 0]
