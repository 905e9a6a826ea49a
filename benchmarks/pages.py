"""Tables in the documentation that a script makes: each stands between two marks on its page."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
END = "<!-- end of table -->"


def read_rows(results: Path) -> list[dict[str, str]]:
    """Rows of a recorded CSV file; none where there is no file."""
    if not results.is_file():
        return []
    with results.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def markdown(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table; what a row lacks stays empty."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]


def write_table(page: Path, script: str, lines: Sequence[str]) -> None:
    """Replace what ``benchmarks/<script>`` has written on a page.

    Raises:
        ValueError: if the page lacks one of the two marks.
    """
    begin = f"<!-- table: benchmarks/{script} -->"
    before, found, rest = page.read_text().partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{page} has no place for the table: {begin} and, below, {END}")
    page.write_text("\n".join([f"{before}{begin}", "", *lines, "", f"{END}{after}"]))
