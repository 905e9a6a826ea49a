"""Style of all charts, and how they get onto a page.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and shapes differ as well, for print. Charts are
as wide as a phone, so that their letters stay readable there; the page puts them side by side where there is room.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito 2008, without black (axes are black) and yellow (it fades on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#595959"
# Text over points and lines stays readable.
HALO = [patheffects.Stroke(linewidth=2.2, foreground="white"), patheffects.Normal()]
WIDTH = 4.4  # inches
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


def series(index: int) -> tuple[str, str]:
    """Colour and marker of the result ``index`` in all charts of a page; pairs repeat after 36 results only."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


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


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, and its axes, in our style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()
