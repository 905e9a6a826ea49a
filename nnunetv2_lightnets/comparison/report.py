"""The report of a comparison: a page to read, Markdown and LaTeX to paste, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nnunetv2_lightnets.comparison import figures
from nnunetv2_lightnets.comparison.analysis import (
    LEVEL,
    Comparison,
    Difference,
    Score,
    structure_titles,
    versions,
)
from nnunetv2_lightnets.comparison.cases import Result, Structure
from nnunetv2_lightnets.comparison.pictures import case_picture
from nnunetv2_lightnets.comparison.statistics import Interval
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.pages.figures import png, svg
from nnunetv2_lightnets.pages.render import template
from nnunetv2_lightnets.pages.text import MINUS, NOTHING, markdown, number, signed


def write_report(
    comparison: Comparison, folder: Path, *, labels: Path | None = None, images: Path | None = None
) -> list[Path]:
    """Write ``compare.html``, ``.md``, ``.tex``, ``.csv``, ``.json`` and ``compare_cases.csv``.

    Args:
        comparison: what to report.
        folder: made if it is not there; files of an earlier comparison are replaced.
        labels: folder of reference segmentations for pictures; None takes those that nnU-Net scored against.
        images: folder of images for pictures; None looks where nnU-Net keeps them.

    Returns:
        The files, the page first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "compare.html": _page(comparison, labels, images),
        "compare.md": _render("compare.md.jinja", comparison, escape=markdown),
        "compare.tex": _render("compare.tex.jinja", comparison, escape=_latex),
        "compare.csv": _csv(_rows(comparison)),
        "compare_cases.csv": _csv(_case_rows(comparison)),
        "compare.json": json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
    return [folder / name for name in contents]


# ------------------------------------------------------------------------------------------------------- formatting


def p_value(value: float | None) -> str:
    """``0.032``, or ``<0.001``."""
    return NOTHING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def interval(bounds: Interval | None, form: Callable[[float], str] = number) -> str:
    """``0.85 to 0.89``."""
    return NOTHING if bounds is None else f"{form(bounds.low)} to {form(bounds.high)}"


def share(value: float) -> str:
    """``83 %``."""
    return f"{100 * value:.0f} %"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: "\\" + c for c in "&%$#_{}"} | {MINUS: "$-$", NOTHING: "--", "<": "$<$", ">": "$>$"}
    return "".join(special.get(c, c) for c in text)


def _render(name: str, comparison: Comparison, *, escape: Callable[[str], str] | None, **more: Any) -> str:
    filters: dict[str, Callable[..., str]] = {
        "number": number,
        "signed": signed,
        "p": p_value,
        "interval": interval,
        "share": share,
        "signed_interval": lambda bounds: interval(bounds, signed),
    }
    return template("nnunetv2_lightnets.comparison", name, filters, escape).render(
        c=comparison,
        s=comparison.settings,
        structures=structure_titles(comparison.results),
        how=methods(comparison),
        versions=versions(),
        level=LEVEL,
        **more,
    )


# ------------------------------------------------------------------------------------------------------------ words


def unit(comparison: Comparison) -> str:
    """What one value of the statistics stands for."""
    return "case" if comparison.subjects is None else "subject"


def methods(comparison: Comparison) -> list[tuple[str, str]]:
    """How every number was made, as (what, how)."""
    settings, table = comparison.settings, comparison.overall()
    several = len(comparison.results) > 2
    n_structures = len(comparison.reference.structures)
    one = unit(comparison)
    aggregation = f"Mean over {one}s."
    if n_structures > 1:
        aggregation = (
            f"Foreground mean: each case's mean over its {n_structures} structures, without background, then the mean "
            f"over {one}s."
        )
    if comparison.subjects is not None:
        aggregation += f" Cases of one subject are averaged first: {comparison.subjects} subjects."
    empty = {
        "drop": "A case whose reference lacks a structure is left out for this structure, for all results alike, "
        "whatever they predict there; such false positives are counted apart.",
        "one": "Where the reference lacks a structure, a prediction that lacks it, too, counts 1, any other 0.",
    }[settings.empty]
    metric = {
        "Dice": "Dice (nnU-Net's own evaluation, per case, at the original resolution)",
        "IoU": "IoU (nnU-Net's own evaluation, per case, at the original resolution)",
        "NSD": f"NSD at {settings.nsd_tolerance or 0:g} {settings.nsd_unit} (MONAI, sub-voxel surface areas)",
    }
    families = (
        "one family is all results"
        if n_structures == 1
        else "one family is the foreground mean of all results, another all structures of all results"
    )
    return [
        ("Metric", "; ".join(metric.get(m, m) for m in settings.metrics) + ". More is better."),
        ("Cases", f"{len(comparison.reference.cases)}, the same for all results, from {_folds(comparison)}."),
        ("Aggregation", aggregation),
        ("Empty references", empty),
        (
            "Intervals",
            f"95 %, bootstrap over {one}s ({settings.resamples} samples, seed {settings.seed}), percentiles widened "
            f"for few {one}s (Hesterberg 2015); of differences: paired. They cover the choice of {one}s, not the "
            "spread between trainings.",
        ),
        (
            "Difference",
            f"Wilcoxon's signed-rank test, two-sided; a {one} without a difference is left out. r: matched-pairs "
            f"rank-biserial correlation, from −1 (loses every {one}) to 1 (wins every {one}).",
        ),
        (
            "Non-inferiority",
            f"One-sided test of a mean loss of {settings.margin:g} or more at level {LEVEL:g}: the stricter one of the "
            "paired t test and the bootstrap t. The bound is one-sided, 95 %, not corrected.",
        ),
        (
            "Correction",
            f"Holm's, within a metric: {families}. Differences and non-inferiority are corrected alike; metrics are "
            "not corrected for each other.",
        ),
        (
            "Ranks",
            f"Mean over {one}s of the rank within the {one}, ties share"
            + (f"; Friedman's test: p {p_value(table.friedman)}" if several and table.friedman is not None else "")
            + f". First: share of bootstrap samples of {one}s in which the result has the best mean.",
        ),
    ]


def _folds(comparison: Comparison) -> str:
    folds = comparison.reference.folds
    if not folds:
        return "one set of predictions"
    return f"fold {folds[0]}" if len(folds) == 1 else f"{len(folds)} folds ({', '.join(folds)})"


def text_summary(comparison: Comparison) -> str:
    """The main result in a few lines, for the terminal."""
    table, settings = comparison.overall(), comparison.settings
    width = max(len(name) for name in comparison.names)
    lines = [
        f"{table.metric}, {table.title}, {len(table.units)} {unit(comparison)}s, reference "
        f"{comparison.reference.name}, margin {settings.margin:g}"
    ]
    for i, score in enumerate(table.scores):
        line = f"{score.result:<{width}}  {number(score.mean)}"
        if i:
            d = table.differences[i - 1]
            line += f"  {signed(d.mean)} ({interval(d.interval, signed)})  p {p_value(d.p_holm)}  {d.verdict}"
        lines.append(line)
    return "\n".join([*lines, *(f"Note: {note}" for note in comparison.notes)])


# ------------------------------------------------------------------------------------------------------------- page


def _page(comparison: Comparison, labels: Path | None, images: Path | None) -> str:
    titles = structure_titles(comparison.results)
    by_name = {result.name: result for result in comparison.results}
    charts = {metric: _charts(comparison, metric) for metric in comparison.settings.metrics}
    pictures = [
        _picture([comparison.reference, by_name[loss.result]], loss.case, titles, labels, images)
        for loss in comparison.losses
    ]
    losses = list(zip(comparison.losses, pictures, strict=True))
    return _render("compare.html.jinja", comparison, escape=None, charts=charts, losses=losses)


def _picture(
    results: Sequence[Result], case: str, titles: dict[Structure, str], labels: Path | None, images: Path | None
) -> tuple[str, str]:
    """The picture of a case as a ``data:`` address, or why there is none."""
    try:
        return png(case_picture(results, case, titles, labels=labels, images=images)), ""
    except LightNetsError as error:
        return "", str(error)


def _charts(comparison: Comparison, metric: str) -> list[tuple[str, str]]:
    """Charts of one metric as (svg, caption)."""
    overall, margin = comparison.overall(metric), comparison.settings.margin
    reference, one = comparison.reference.name, unit(comparison)
    captions: list[tuple[Figure, str]] = [
        (
            figures.forest([overall, *comparison.by_structure(metric)], reference, margin),
            f"Mean difference from {reference} with 95 % interval; left of 0 is a loss, left of the dashed line a loss "
            "beyond the margin.",
        ),
        (figures.spread(overall), f"Every {one}; box: quartiles and median, coloured bar: mean."),
    ]
    captions += [
        (
            figures.case_against_case(overall, j),
            f"{comparison.names[j]} against {reference}, {one} by {one}; points below the line are losses.",
        )
        for j in range(1, len(comparison.results))
    ]
    return [(svg(figure, caption), caption) for figure, caption in captions]


# ------------------------------------------------------------------------------------------------------ for programs


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each metric, structure and result."""
    rows = []
    for table in comparison.tables:
        differences: Sequence[Difference | None] = [None, *table.differences]
        for score, difference in zip(table.scores, differences, strict=True):
            rows.append(
                {"metric": table.metric, "structure": table.title, "n": len(table.units), "dropped": table.dropped}
                | _score_row(score)
                | _difference_row(difference)
            )
    return rows


def _score_row(score: Score) -> dict[str, Any]:
    bounds = score.interval
    return {
        "result": score.result,
        "mean": score.mean,
        "ci_low": bounds and bounds.low,
        "ci_high": bounds and bounds.high,
        "sd": score.deviation,
        "mean_rank": score.rank,
        "share_first": score.first,
    }


def _difference_row(d: Difference | None) -> dict[str, Any]:
    bounds = d and d.interval
    return {
        "difference": d and d.mean,
        "difference_ci_low": bounds and bounds.low,
        "difference_ci_high": bounds and bounds.high,
        "p_wilcoxon": d and d.p,
        "p_wilcoxon_holm": d and d.p_holm,
        "rank_biserial": d and d.effect,
        "wins": d and d.wins,
        "ties": d and d.ties,
        "losses": d and d.losses,
        "non_inferiority_lower_bound": d and d.lower,
        "p_non_inferiority": d and d.p_non_inferior,
        "p_non_inferiority_holm": d and d.p_non_inferior_holm,
        "non_inferior": d and d.non_inferior,
        "verdict": d and d.verdict,
    }


def _case_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each case, metric and structure, as nnU-Net scored it, a column for each result."""
    rows: list[dict[str, Any]] = []
    for case, of_reference in sorted(comparison.reference.cases.items()):
        for metric in comparison.settings.metrics:
            for structure, title in structure_titles(comparison.results).items():
                row: dict[str, Any] = {
                    "case": case,
                    "fold": of_reference.fold,
                    "metric": metric,
                    "structure": title,
                    "reference_voxels": int(of_reference.metrics[structure]["n_ref"]),
                }
                row.update({r.name: _known(r.cases[case].metrics[structure][metric]) for r in comparison.results})
                rows.append(row)
    return rows


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows, out = list(rows), io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison for programs; what is not known is null."""
    return {
        "reference": comparison.reference.name,
        "results": [
            {
                "name": r.name,
                "folder": str(r.folder),
                "folds": list(r.folds),
                "budgets": list(r.budgets),
                "cases": len(r.cases),
            }
            for r in comparison.results
        ],
        "settings": asdict(comparison.settings) | {"level": LEVEL, "subjects": comparison.subjects},
        "methods": dict(methods(comparison)),
        "notes": comparison.notes,
        "versions": versions(),
        "tables": [
            {
                "metric": t.metric,
                "structure": t.title,
                "n": len(t.units),
                "dropped": t.dropped,
                "p_friedman": t.friedman,
                "results": [
                    _score_row(s) | (_difference_row(d) if d else {})
                    for s, d in zip(t.scores, [None, *t.differences], strict=True)
                ],
            }
            for t in comparison.tables
        ],
        "empty_references": [asdict(f) for f in comparison.false_positives],
        "largest_losses": [
            {"result": x.result, "case": x.case, "fold": x.fold, "difference": x.difference}
            | {"values": {k: [_known(a), _known(b)] for k, (a, b) in x.values.items()}}
            for x in comparison.losses
        ],
        "cases": _case_rows(comparison),
    }
