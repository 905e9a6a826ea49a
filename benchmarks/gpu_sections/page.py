"""The page of a card, from its recorded files, and the short tables of the documentation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recording import MOST_ROWS, markdown, read_rows, short

from gpu_sections import networks, speed, training, values
from gpu_sections.bench import NO_TIME, NOTE
from gpu_sections.operators import CHOSEN

MACHINE = "machine.json"
PAGE = "README.md"
Row = dict[str, str]


def about(folder: Path) -> dict[str, Any]:
    """The recorded machine; nothing where none is."""
    file = folder / MACHINE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def card_line(folder: Path) -> str:
    """What was measured on, in a line."""
    known = about(folder)
    facts = [known.get("card", "unknown"), f"driver {known.get('driver')}", f"torch {known.get('torch')}"]
    facts += [f"Triton {known.get('Triton')}", f"a copy moves {known.get('copy bandwidth, GB/s')} GB/s"]
    return f"{', '.join(facts)}; {known.get('date')}."


# ---- Tables ----


def values_table(rows: Sequence[Row]) -> list[Row]:
    """Rows of one operator and dtype (or of one way to run networks), summed up."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        network = row["way"] in values.NETWORK_WAYS
        groups[(f"networks, {row['way']}", "") if network else (row["operator"], row["dtype"])].append(row)
    found: list[Row] = []
    for (what, dtype), group in groups.items():
        errors = [row["output error"] for row in group if row["output error"]]
        gradients = [row["gradient error"] for row in group if row["gradient error"]]
        found.append(
            {
                "what": what,
                "dtype": dtype,
                "right": str(sum(row["ok"] == "yes" for row in group)),
                "wrong": str(sum(row["ok"] == "no" for row in group)),
                "without a result": str(sum(not row["ok"] for row in group)),
                "largest error": max(errors, key=float, default=""),
                "of gradients": max(gradients, key=float, default=""),
            }
        )
    return found


def speed_table(rows: Sequence[Row]) -> list[Row]:
    """Times of a case beside each other, by pass and dtype; and the share of copy bandwidth of what is chosen."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["operator"], row["case"], row["dtype"], row["pass"])
        line = found.setdefault(key, dict(zip(("operator", "case", "dtype", "pass"), key, strict=True)))
        line[f"{row['way']}, ms"] = (row["graph ms"] or row["ms"]) or row[NOTE]
        if row["way"] == CHOSEN:
            line["% of copy bandwidth"] = row["%"]
            line["goal"] = row["goal %"] and f"≥ {row['goal %']}"
    return list(found.values())


def networks_table(rows: Sequence[Row], what: str) -> list[Row]:
    """Seconds and memory of each trainer, and the multiple of nnU-Net's own network."""
    base = {
        (row["patch"], row["way"]): row["seconds"]
        for row in rows
        if (row["what"], row["trainer"]) == (what, networks.BASELINE)
    }
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["what"] != what:
            continue
        line = found.setdefault(
            (row["trainer"], row["patch"]),
            {"trainer": f"`{row['trainer']}`", "patch": row["patch"], "batch": row["batch"]},
        )
        way, seconds = row["way"], row["seconds"]
        line[f"{way}, ms"] = short(1e3 * float(seconds)) if seconds else row[NOTE]
        by = base.get((row["patch"], way))
        if seconds and by:
            line[f"{way}, × nnU-Net"] = f"{float(seconds) / float(by):.2f}×"
        if row["peak MB"]:
            line[f"{way}, MB"] = f"{int(row['peak MB']):,}"
    return list(found.values())


def training_table(rows: Sequence[Row]) -> list[Row]:
    """The end of each training, and its best Dice."""
    found = []
    for row in rows:
        if row["epoch"] != training.ALL:
            continue
        epochs = [other for other in rows if other["trainer"] == row["trainer"] and other["epoch"] != training.ALL]
        best = max((other["Dice"] for other in epochs if other["Dice"]), key=float, default="")
        line = {"trainer": f"`{row['trainer']}`", "minutes": row["minutes"], "iterations": row["iterations"]}
        found.append(line | {"last Dice": row["Dice"], "best Dice": best, "note": row[NOTE]})
    return found


# ---- Pages ----


def tabled(rows: Sequence[Row], most: int | None = None) -> list[str]:
    """Lines of a table, or that there is none."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [*markdown(columns, rows[:most], len(rows)), ""] if rows else ["Not measured.", ""]


def noted(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Lines of rows that are wrong or have no result, with the reason; those that time did not allow are counted."""
    lines = []
    for row in rows:
        why = row[NOTE] if row.get("ok", "") != "no" else f"wrong: {row['output error']} / {row['gradient error']}"
        if why and why != NO_TIME:
            lines.append(f"* {', '.join(row[name] for name in names if row[name])}: {why}")
    late = sum(row[NOTE] == NO_TIME for row in rows)
    lines += [f"* {late} rows were not run: their section's time was over."] if late else []
    return [*lines, ""] if lines else []


def page(folder: Path) -> list[str]:
    """All that is recorded of a card."""
    rows = {table.file: read_rows(folder / table.file) for table in TABLES}
    right, fast, costs, learnt = (rows[table.file] for table in TABLES)
    steps = networks_table(costs, networks.STEP)
    lines = [
        f"# {about(folder).get('card', 'unknown')}",
        "",
        card_line(folder),
        "",
        f"Machine: [`{MACHINE}`]({MACHINE}).",
        "",
    ]
    lines += ["## a. Values", "", *tabled(values_table(right)), *noted(right, values.TABLE.names)]
    lines += ["## b. Speed of operators", "", *tabled(speed_table(fast)), *noted(fast, speed.TABLE.names)]
    lines += ["## c. Networks", "", "A training step:", "", *tabled(steps), "A forward pass of one patch:", ""]
    lines += [*tabled(networks_table(costs, networks.FORWARD)), *noted(costs, networks.TABLE.names)]
    lines += ["## d. Trainings", "", *tabled(training_table(learnt))]
    files = ", ".join(f"[`{table.file}`]({table.file})" for table in TABLES if rows[table.file])
    return [*lines, f"All rows: {files}."]


TABLES = (values.TABLE, speed.TABLE, networks.TABLE, training.TABLE)


def summary(folder: Path) -> list[str]:
    """Of a card, what fits into a text."""
    rows = {table.file: read_rows(folder / table.file) for table in TABLES}
    right, fast, costs, learnt = (rows[table.file] for table in TABLES)
    counts = {ok: sum(row["ok"] == ok for row in right) for ok in ("yes", "no")}
    told = [row for row in fast if (row["dtype"], row["way"]) == ("float32", CHOSEN)][:MOST_ROWS]
    shown = ("operator", "case", "pass", "ms", "graph ms", "%", "goal %")
    steps = networks_table([row for row in costs if row["way"] == "AMP"], networks.STEP)
    lines = [card_line(folder), "", f"Values: {counts['yes']} right, {counts['no']} wrong.", ""]
    lines += tabled([{column: row[column] for column in shown} for row in told])
    lines += ["A training step with mixed precision:", "", *tabled(steps, MOST_ROWS)]
    return [*lines, "Trainings for equal minutes:", "", *tabled(training_table(learnt), MOST_ROWS)]
