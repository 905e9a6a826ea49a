"""How the scripts here measure, record, and put a table on a page: all in one way.

A script measures and puts rows into a CSV file under ``results/``, one by one, so that an interruption loses nothing.
Its function ``tables()`` makes the tables of the documentation from recorded files alone. A page has a place for them:

    <!-- table: benchmarks/SCRIPT.py -->
    <!-- end of table -->

``tables.py`` lists the scripts and writes all their tables anew. A figure that several pages show comes from one
function: counts from ``network_costs.cells``, time and memory on a CPU from ``trainers_cpu.cells``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nnunetv2_lightnets.files import write_atomically
from nnunetv2_lightnets.pages.text import csv_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end of table -->"
MOST_ROWS = 7  # of a table in a text; who wants all opens the CSV file
MACHINE = ("processor", "cores", "threads", "torch")
Key = TypeVar("Key")
Tables = dict[str, list[str]]  # page (from the repository's root) -> lines


# ---- Measure ----


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A script's arguments; its docstring is the help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def machine(*facts: str) -> dict[str, Any]:
    """What the times depend on: the columns MACHINE, or those named."""
    import torch

    from nnunetv2_lightnets.costs.machine import machine as described

    known = described(torch.device("cpu"))
    return {fact: known[fact] for fact in facts or MACHINE}


def take_turns(runs: Mapping[Key, Callable[[], Any]], turns: int) -> dict[Key, list[float]]:
    """Seconds of each run, turn by turn, so that a busy moment of the machine hits all alike; the first is not counted.

    Args:
        runs: what to time.
        turns: that are counted.

    Returns:
        ``turns`` times for each of ``runs``.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for turn in range(turns + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios of one turn."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=False))


# ---- Record ----


def read_rows(results: Path) -> list[dict[str, str]]:
    """Rows of a recorded CSV file; none where there is no file."""
    if not results.is_file():
        return []
    with results.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class Record:
    """A CSV file of results, to which rows are added as they are measured.

    Args:
        file: it may exist; then its rows are kept.
        key: columns that name a row: a new row takes the place of the old one of that name.

    Attributes:
        rows: all of them, as text.
    """

    def __init__(self, file: Path, *key: str) -> None:
        self.file, self.key, self.rows = file, key, read_rows(file)

    def __contains__(self, names: Sequence[Any]) -> bool:
        return tuple(map(str, names)) in map(self._name, self.rows)

    def _name(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[column] for column in self.key)

    def put(self, *rows: Mapping[str, Any]) -> None:
        """Add or replace rows, print them, and write the file whole or not at all."""
        by_name = {self._name(row): row for row in self.rows}
        for row in rows:
            new = {column: "" if value is None else str(value) for column, value in row.items()}
            by_name[self._name(new)] = new
            print("  ".join(new.values()), flush=True)
        self.rows = list(by_name.values())
        write_atomically(self.file, csv_text(self.rows))


# ---- Put on a page ----


def markdown(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], most: int = MOST_ROWS) -> list[str]:
    """Lines of a Markdown table with ``most`` rows or fewer; what a row lacks stays empty.

    Raises:
        ValueError: it has too many rows for a text.
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    if len(lines) > most + 2:
        raise ValueError(f"a table of {len(lines) - 2} rows for a text: choose {most}, and link the CSV file")
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """:func:`markdown` with all columns that the rows have."""
    return markdown(list(dict.fromkeys(column for row in rows for column in row)), rows)


def link(page: str, results: Path, text: str = "All rows") -> str:
    """A line below a table that leads to the file it was chosen from."""
    return f"{text}: [`{results.name}`]({os.path.relpath(results, (ROOT / page).parent)})."


def short(value: float) -> str:
    """Three digits that count, and no exponent: 0.0487, 9.15, 477, 1001."""
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    value = float(f"{value:.3g}")
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def placed(text: str, script: str) -> tuple[str, str, str]:
    """A page before, between and after the marks of a script's table.

    Raises:
        ValueError: the page lacks one of the two marks.
    """
    begin = f"<!-- table: benchmarks/{script}.py -->"
    before, found, rest = text.partition(begin)
    between, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"no place for the table: {begin} and, below, {END}")
    return before + begin, between, END + after


def write_tables(script: str, tables: Mapping[str, Sequence[str]], root: Path = ROOT) -> None:
    """Replace what ``benchmarks/<script>.py`` has written on its pages.

    Raises:
        ValueError: a page lacks one of the two marks; it is left alone.
    """
    for page, lines in tables.items():
        text = (root / page).read_text(encoding="utf-8")
        try:
            before, _, after = placed(text, script)
        except ValueError as error:
            raise ValueError(f"{page} has {error}") from None
        write_atomically(root / page, "\n".join([before, "", *lines, "", after]))
