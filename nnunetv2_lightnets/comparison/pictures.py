"""Pictures of single cases: the slice that went wrong, with the contours of the reference and of the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from nnunetv2_lightnets.comparison.cases import Result, Structure
from nnunetv2_lightnets.comparison.volumes import image_file, read_image, read_segmentation
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.pages.figures import COLOURS, WIDTH
from nnunetv2_lightnets.pages.names import short

_CONTEXT = 0.35  # of the structures' extent, shown around them
_SMALLEST = 24  # voxels shown at least
_TALLEST = 1.8  # height of a panel over its width
_REFERENCE = "#F0E442"  # Okabe and Ito's yellow, seen on black and white with a dark edge
_STYLES = ("solid", "dashed", "dotted", "dashdot")
_EDGE = [patheffects.Stroke(linewidth=3.2, foreground="black"), patheffects.Normal()]


def case_picture(
    panels: Mapping[str, Result],
    case: str,
    titles: dict[Structure, str],
    *,
    labels: Path | None = None,
    images: Path | None = None,
) -> Figure:
    """One panel for each result: the image, if found, the reference segmentation in yellow, predictions in colours.

    Shown is the slice (of the first array axis, nnU-Net's slowest one) where the last result is wrong in most voxels.

    Args:
        panels: the results to show side by side, by what to call each.
        case: its name.
        titles: of the structures.
        labels: see :func:`nnunetv2_lightnets.comparison.report.write_report`.
        images: as well.

    Raises:
        LightNetsError: a file is gone or cannot be read.
    """
    results = list(panels.values())
    cases = [result.cases[case] for result in results]
    file = cases[0].reference if labels is None else labels / cases[0].prediction.name
    for needed in (file, *(c.prediction for c in cases)):
        if not needed.is_file():
            raise LightNetsError(f"no picture of {case}: {needed} is gone")
    description = results[0].dataset_json
    reference, spacing = read_segmentation(file, description)
    predictions = [read_segmentation(c.prediction, description)[0] for c in cases]
    found = image_file(cases[0], file, images)
    image = read_image(found, description) if found is not None else np.zeros(reference.shape, np.float32)
    if any(array.shape[: reference.ndim] != reference.shape for array in (image, *predictions)):
        raise LightNetsError(f"no picture of {case}: image, labels and predictions differ in shape")
    where = case
    if reference.ndim == 3:
        index = _worst_slice(reference, predictions[-1], titles, results[-1].ignore_label)
        where = f"{case}, slice {index + 1} of {len(reference)}"
        reference, image, predictions = reference[index], image[index], [p[index] for p in predictions]
        spacing = spacing[1:]
    rows, columns = _window([reference, *predictions], titles)
    height, width = (len(range(*part.indices(n))) for part, n in zip((rows, columns), reference.shape, strict=True))
    tall = min(height * spacing[0] / (width * spacing[1]), _TALLEST)
    figure = Figure(figsize=(WIDTH, WIDTH / len(results) * tall + 0.75), layout="constrained")
    side_by_side = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, label, prediction in zip(side_by_side, panels, predictions, strict=True):
        axes.imshow(image[rows, columns], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for structure in titles:
            mask = np.isin(reference[rows, columns], structure)
            _contour(axes, mask, _REFERENCE, 2.6, "solid", path_effects=_EDGE)
        for j, structure in enumerate(titles):
            _contour(axes, np.isin(prediction[rows, columns], structure), *_line(j))
        axes.set_title(short(label, 22), fontsize=9)
        axes.set(aspect=spacing[0] / spacing[1], xticks=[], yticks=[], facecolor="black")
    shown = [(j, s) for j, s in enumerate(titles) if any(np.isin(a, s).any() for a in (reference, *predictions))]
    handles = [Line2D([], [], color=_line(j)[0], lw=2, ls=_line(j)[2], label=short(titles[s])) for j, s in shown]
    handles.insert(0, Line2D([], [], color=_REFERENCE, lw=2.2, label="reference", path_effects=_EDGE))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8, title=where, title_fontsize=8
    )
    return figure


def _worst_slice(
    reference: NDArray[Any], prediction: NDArray[Any], structures: dict[Structure, str], ignore_label: int | None
) -> int:
    """Index of the slice with most wrong voxels of any structure."""
    wrong = np.zeros(len(reference), int)
    scored = np.ones(reference.shape, bool) if ignore_label is None else reference != ignore_label
    for structure in structures:
        mistaken = np.isin(reference, structure) != np.isin(prediction, structure)
        wrong += (mistaken & scored).sum(axis=(1, 2))
    return int(wrong.argmax())


def _window(maps: Sequence[NDArray[Any]], structures: dict[Structure, str]) -> tuple[slice, slice]:
    """Rows and columns that hold every structure in every map, with some context."""
    there = np.any(np.isin(np.stack(maps), [label for structure in structures for label in structure]), axis=0)
    if not there.any():
        return slice(None), slice(None)
    bounds = []
    for axis in range(2):
        inside = np.flatnonzero(there.any(axis=1 - axis))
        extent = int(inside[-1] - inside[0]) + 1
        context = max(int(_CONTEXT * extent), (_SMALLEST - extent) // 2, 2)
        bounds.append(slice(max(int(inside[0]) - context, 0), int(inside[-1]) + 1 + context))
    return bounds[0], bounds[1]


def _line(index: int) -> tuple[str, float, str]:
    """Colour, width and style of the contour of structure ``index``; repeats after 24 structures."""
    return COLOURS[index % len(COLOURS)], 1.5, _STYLES[index // len(COLOURS) % len(_STYLES)]


def _contour(axes: Axes, mask: NDArray[np.bool_], colour: str, width: float, style: str, **more: Any) -> None:
    """The outline of a mask, also where it touches the border of the window."""
    if mask.any():
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
        axes.contour(columns, rows, padded, [0.5], colors=[colour], linewidths=[width], linestyles=[style], **more)
        axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))
