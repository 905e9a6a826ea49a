"""Charts of a comparison: differences with their intervals, spread of scores, case against case."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from nnunetv2_lightnets.comparison.analysis import Table
from nnunetv2_lightnets.pages.figures import COLOURS, GREY, MARKERS, WIDTH, axes_of, short

_MANY_POINTS = 1500  # more of them make an SVG heavy
_LABELLED_HEIGHT = 200  # points, about, of the square of case_against_case


def forest(tables: Sequence[Table], reference: str, margin: float) -> Figure:
    """Mean paired differences from the reference result with 95 % intervals, and the margin as a line.

    Args:
        tables: of one metric; each becomes a group of rows.
        reference: name of the reference result.
        margin: of non-inferiority.
    """
    names = [d.result for d in tables[0].differences]
    rows = len(tables) * (len(names) + (len(names) > 1))
    figure, axes = axes_of(WIDTH, 1.2 + 0.24 * rows)
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
    figure, axes = axes_of(WIDTH, 0.9 + 0.5 * len(names))
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
    figure, axes = axes_of(WIDTH * 0.8, WIDTH * 0.8)
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
