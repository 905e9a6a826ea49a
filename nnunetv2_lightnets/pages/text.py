"""Numbers, names and rows as pages and files show them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """The rows, by column, as CSV with Unix line ends; what a row lacks, and None, becomes an empty field.

    The columns are those named, or all that the rows have, in the order of their first appearance.
    """
    columns = columns or list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
