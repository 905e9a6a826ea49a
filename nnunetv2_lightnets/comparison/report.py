"""The report of a comparison: a page to read, Markdown and LaTeX to paste, CSV and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nnunetv2_lightnets.comparison import figures
from nnunetv2_lightnets.comparison.export import as_json, case_rows, rows, versions
from nnunetv2_lightnets.comparison.findings import Comparison, structure_titles
from nnunetv2_lightnets.comparison.pictures import case_picture
from nnunetv2_lightnets.comparison.wording import interval, lead, methods, notes, p_value, share, title, unit
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.pages.figures import png, svg
from nnunetv2_lightnets.pages.names import Names, page_names
from nnunetv2_lightnets.pages.render import template, write_files
from nnunetv2_lightnets.pages.text import MINUS, NOTHING, csv_text, markdown, number, signed


def write_report(
    comparison: Comparison, folder: Path, *, labels: Path | None = None, images: Path | None = None
) -> list[Path]:
    """Write ``compare.html``, ``.md``, ``.tex``, ``.csv``, ``.json`` and ``compare_cases.csv``; returns the files.

    Results have their labels on the page and in titles, their full names in everything that is data.

    Args:
        comparison: what to report.
        folder: made if it is not there; files of an earlier comparison are replaced.
        labels: folder of reference segmentations for pictures; None takes those that nnU-Net scored against.
        images: folder of images for pictures; None looks where nnU-Net keeps them.
    """
    names = page_names(comparison.names)
    return write_files(
        folder,
        {
            "compare.html": _page(comparison, names, labels, images),
            "compare.md": _render("compare.md.jinja", comparison, names, escape=markdown),
            "compare.tex": _render("compare.tex.jinja", comparison, names, escape=_latex),
            "compare.csv": csv_text(rows(comparison)),
            "compare_cases.csv": csv_text(case_rows(comparison)),
            "compare.json": json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n",
        },
    )


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: "\\" + c for c in "&%$#_{}"} | {MINUS: "$-$", NOTHING: "--", "<": "$<$", ">": "$>$"}
    return "".join(special.get(c, c) for c in text)


def _render(
    name: str, comparison: Comparison, names: Names, *, escape: Callable[[str], str] | None, **more: Any
) -> str:
    filters: dict[str, Callable[..., str]] = {f.__name__: f for f in (number, signed, interval, share)}
    filters |= {"p": p_value, "label": names.label, "signed_interval": lambda bounds: interval(bounds, signed)}
    return template("nnunetv2_lightnets.comparison", name, filters, escape).render(
        c=comparison,
        s=comparison.settings,
        one=unit(comparison),
        title=title(comparison, names),
        lead=lead(comparison, names),
        how=methods(comparison),
        versions=versions(),
        **more,
    )


def _page(comparison: Comparison, names: Names, labels: Path | None, images: Path | None) -> str:
    """The page, with its charts and pictures inside."""
    by_name, titles = {r.name: r for r in comparison.results}, structure_titles(comparison.results)
    pictures, missing = [], []
    for worst in comparison.worst_cases:
        panels = {names.label(r.name): r for r in (comparison.reference, by_name[worst.result])}
        try:
            pictures.append((worst, png(case_picture(panels, worst.case, titles, labels=labels, images=images))))
        except LightNetsError as error:
            missing.append(str(error))
    return _render(
        "compare.html.jinja",
        comparison,
        names,
        escape=None,
        notes=notes(comparison, names.label),
        charts={metric: _charts(comparison, names, metric) for metric in comparison.settings.metrics},
        pictures=pictures,
        missing=list(dict.fromkeys(missing)),
    )


def _charts(comparison: Comparison, names: Names, metric: str) -> list[list[tuple[str, str]]]:
    """Charts of one metric as (svg, caption): those of all results, then one for each result."""
    overall, margin, labels = comparison.overall(metric), comparison.settings.margin, names.for_charts()
    reference, one = names.label(comparison.reference.name), unit(comparison)
    of_all: list[tuple[Figure, str]] = [
        (
            figures.forest([overall, *comparison.by_structure(metric)], labels, margin),
            f"Mean difference from {reference} with 95 % interval; left of 0 is a loss, left of the dashed line a loss "
            "beyond the margin. Arrows: beyond the axis.",
        ),
        (figures.spread(overall, labels), f"Every {one}; box: quartiles and median, coloured bar: mean."),
    ]
    of_each = []
    for j, name in enumerate(comparison.names[1:], start=1):
        worst = ", ".join(
            f"{k}\N{NO-BREAK SPACE}{overall.units[i]}" for k, i in enumerate(figures.worst_units(overall, j), start=1)
        )
        caption = f"{names.label(name)} against {reference}, {one} by {one}; points below the line are losses."
        caption += f" Largest losses: {worst}." if worst else ""
        of_each.append((figures.case_against_case(overall, j, labels), caption))
    return [[(svg(figure, caption), caption) for figure, caption in group] for group in (of_all, of_each)]
