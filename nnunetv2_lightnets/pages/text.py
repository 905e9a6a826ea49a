"""Numbers and names as pages show them."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"


def number(value: float | None, digits: int = 4) -> str:
    """``0.8712``; a dash for what is not known."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 4) -> str:
    """``+0.0012`` or ``−0.0012``; a dash for what is not known."""
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def markdown(text: str) -> str:
    """Text in which nothing is markup for Markdown."""
    for special in "\\`*_[]<>|":
        text = text.replace(special, "\\" + special)
    return text
