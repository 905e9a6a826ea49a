"""The report of a benchmark: a page to read, Markdown to paste, CSV for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_lightnets.costs import figures
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import read_json
from nnunetv2_lightnets.nnunet.trainer_names import BUDGET
from nnunetv2_lightnets.pages.figures import svg
from nnunetv2_lightnets.pages.names import Names, page_names
from nnunetv2_lightnets.pages.render import template, write_files
from nnunetv2_lightnets.pages.text import NOTHING, csv_text, markdown

Row = dict[str, Any]
NBSP = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line


def write_benchmark(benchmark: dict[str, Any], folder: Path, scores: Mapping[str, float]) -> list[Path]:
    """Write ``benchmark.html``, ``.md`` and ``.csv``; returns the files.

    Args:
        benchmark: settings, machine and rows, as in benchmark.json.
        folder: made if it is not there.
        scores: Dice by the name of a row or of its trainer, see :func:`read_scores`.
    """
    names = page_names([row["name"] for row in benchmark["rows"]])
    charts = _charts(benchmark["rows"], scores, names)
    contents = {
        "benchmark.html": _render("benchmark.html.jinja", benchmark, names, None, charts=charts),
        "benchmark.md": _render("benchmark.md.jinja", benchmark, names, markdown),
        "benchmark.csv": csv_text([_flat(row, scores) for row in benchmark["rows"]], list(_flat({}, {}))),
    }
    return write_files(folder, contents)


def read_scores(file: Path) -> dict[str, float]:
    """Mean of the main metric of each result of a comparison, by its name and by the trainer of its folder.

    Raises:
        LightNetsError: the file is no compare.json.
    """
    content = read_json(file, "give --dice the compare.json of nnUNetv2_lightnets compare")
    try:
        table = content["tables"][0]
        scores = {result["result"]: float(result["mean"]) for result in table["results"]}
        for result in content["results"]:
            if trainer := re.search(r"(nnUNetTrainer[A-Za-z0-9_]*?)__", result["folder"]):
                scores.setdefault(trainer[1], scores[result["name"]])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LightNetsError(f"--dice {file} is no compare.json of nnUNetv2_lightnets compare") from error
    return scores


def score_of(row: Row, scores: Mapping[str, float]) -> float | None:
    """The score of a row; a trainer's score also counts where it was trained with a budget suffix."""
    for name, score in scores.items():
        if name in (row.get("name"), row.get("trainer")) or re.fullmatch(
            rf"{re.escape(str(row.get('name')))}(?:{BUDGET.pattern})+", name
        ):
            return score
    return None


def seconds(value: float | None) -> str:
    """``1.23 s`` or ``45.6 ms``."""
    if value is None:
        return NOTHING
    return f"{value:.2f}{NBSP}s" if value >= 1 else f"{1000 * value:.1f}{NBSP}ms"


def spread(timing: Mapping[str, Any] | None) -> str:
    """Quartiles and number of runs of a timing: ``44.1 to 47.0 ms, 20 runs``."""
    if timing is None:
        return ""
    if timing["runs"] == 1:
        return "1 run"
    low, high = timing["quartiles"]
    first, last = seconds(low), seconds(high)
    if first.split(NBSP)[1] == last.split(NBSP)[1]:
        first = first.split(NBSP)[0]
    return f"{first} to {last}, {timing['runs']} runs"


def megabytes(value: float | None) -> str:
    """``63 MB``."""
    return NOTHING if value is None else f"{value / 1e6:,.0f}{NBSP}MB"


def amount(value: float | None, quantity: str) -> str:
    """Parameters as ``5.016 M``, MACs as ``177.19 G``."""
    if value is None:
        return NOTHING
    if quantity == "parameters":
        return f"{value / 1e6:.3f}{NBSP}M"
    return f"{value / 1e9:.{2 if value >= 1e9 else 4}f}{NBSP}G"


def described(value: Any) -> str:
    """A setting or a property of the machine, for reading."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _render(
    name: str, benchmark: dict[str, Any], names: Names, escape: Callable[[str], str] | None, **more: Any
) -> str:
    machine = dict(benchmark["machine"] or {})
    for key in ("memory", "GPU memory"):
        if machine.get(key):
            machine[key] = f"{machine[key] / 1e9:.0f} GB"
    filters: dict[str, Callable[..., str]] = {f.__name__: f for f in (seconds, spread, megabytes, amount, described)}
    measured = [row for row in benchmark["rows"] if "error" not in row]
    timings = [row[what] for row in measured for what in ("inference", "training", "volume") if row.get(what)]
    return template("nnunetv2_lightnets.costs", name, filters | {"label": names.label}, escape).render(
        rows=measured,
        memory_since=next((timing["memory_since"] for timing in timings if "memory_since" in timing), None),
        shared=", ".join(names.shared.values()),
        failed=[row for row in benchmark["rows"] if "error" in row],
        claims=[claim for row in benchmark["rows"] for claim in row.get("claims", ())],
        every=benchmark["rows"],
        settings=benchmark["settings"],
        machine=machine,
        **more,
    )


def text_table(benchmark: dict[str, Any]) -> str:
    """The benchmark in a few lines, for the terminal."""
    width = max([len(row["name"]) for row in benchmark["rows"]] + [7])
    lines = [f"{'':<{width}}  {'M':>8}  {'GMAC':>9}  {'inference':>10}  {'memory':>9}  {'training':>10}  {'memory':>9}"]
    for row in benchmark["rows"]:
        if "error" in row:
            lines.append(f"{row['name']:<{width}}  failed: {row['error']}")
            continue
        inference, training = row["inference"], row["training"]
        lines.append(
            f"{row['name']:<{width}}  {row['parameters'] / 1e6:>8.3f}  {row['macs'] / 1e9:>9.3f}"
            f"  {seconds(inference['median']):>10}  {megabytes(inference['memory']):>9}"
            f"  {seconds(training['median']):>10}  {megabytes(training['memory']):>9}"
        )
    return "\n".join(lines)


def _flat(row: Row, scores: Mapping[str, float]) -> dict[str, Any]:
    """A row of the CSV file; of an empty row, its columns."""
    flat = {key: row.get(key) for key in ("name", "trainer", "network", "parameters", "macs")}
    for what in ("inference", "training", "volume"):
        timing = row.get(what) or {}
        low, high = timing.get("quartiles", (None, None))
        flat |= {
            f"{what}_seconds": timing.get("median"),
            f"{what}_seconds_quartile_1": low,
            f"{what}_seconds_quartile_3": high,
            f"{what}_runs": timing.get("runs"),
            f"{what}_memory_bytes": timing.get("memory"),
        }
    volume, training = row.get("volume") or {}, row.get("training") or {}
    flat["batch_size"] = training.get("batch_size")
    flat["volume_voxels"] = volume.get("voxels")
    flat["voxels_per_second"] = volume["voxels"] / volume["median"] if volume else None
    flat |= {key: row.get(key) for key in ("compiled", "deep_supervision")}
    flat["score"] = score_of(row, scores)
    flat["error"] = row.get("error")
    return flat


def _charts(rows: list[Row], scores: Mapping[str, float], names: Names) -> list[tuple[str, str]]:
    """Seconds, and scores where there are any, against every cost, as (svg, caption)."""
    measured, labels = [row for row in rows if "error" not in row], names.for_charts()
    costs: list[tuple[str, Callable[[Row], float]]] = [
        ("GMAC of one patch", lambda row: row["macs"] / 1e9),
        ("million parameters", lambda row: row["parameters"] / 1e6),
        ("MB of memory in training", lambda row: row["training"]["memory"] / 1e6),
    ]
    goals: list[tuple[str, list[Row], Callable[[Row], float], bool]] = [
        ("seconds per patch, inference", measured, lambda row: row["inference"]["median"], False)
    ]
    if scored := [row for row in measured if score_of(row, scores) is not None]:
        goals.insert(0, ("mean Dice", scored, lambda row: score_of(row, scores) or 0.0, True))
    charts = []
    for goal, points, value, more_is_better in goals:
        for cost, cost_of in costs:
            if len(points) < 2 or any(cost_of(row) <= 0 for row in points):
                continue
            caption = f"{goal[0].upper()}{goal[1:]} against {cost}. Filled: no other network is better in both."
            x, y = ([of(row) for row in points] for of in (cost_of, value))
            shown = [labels[row["name"]] for row in points]
            figure = figures.pareto(shown, x, y, cost, goal, more_is_better=more_is_better)
            charts.append((svg(figure, caption), caption))
    return charts
