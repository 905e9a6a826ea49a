"""Scoring segmentations: nnU-Net's own metrics for folders of predictions, and normalised surface Dice by MONAI.

NSD at tolerance t is the share of both surfaces that lies within t of the other one (Nikolov et al. 2018,
arXiv:1809.04430). MONAI's sub-voxel option measures surface areas as DeepMind's surface-distance does.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nnunetv2_lightnets.comparison.cases import Result, Structure, case_name, listed, structure_label
from nnunetv2_lightnets.comparison.volumes import read_segmentation, reader
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line

NSD = "NSD"
_WORTH_WORKERS = 30.0  # seconds of work left
T = TypeVar("T")


def for_each_case(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], processes: int, description: str
) -> list[T]:
    """Call ``function(*job)`` for every job, in order, with a progress bar.

    Work starts in this process; worker processes, which import torch first, are started where much is left to do.
    """
    from tqdm import tqdm

    done: list[T] = []
    start = time.perf_counter()
    with tqdm(total=len(jobs), desc=description, unit="case", leave=False) as bar:
        for job in jobs:
            done.append(function(*job))
            bar.update()
            if len(done) == 1:  # which also imported things
                start = time.perf_counter()
                continue
            left = (time.perf_counter() - start) / (len(done) - 1) * (len(jobs) - len(done))
            if processes > 1 and left > _WORTH_WORKERS:
                break
        if rest := jobs[len(done) :]:
            with ProcessPoolExecutor(min(processes, len(rest)), multiprocessing.get_context("spawn")) as pool:
                for result in pool.map(function, *zip(*rest, strict=True)):
                    done.append(result)
                    bar.update()
    return done


def score_folder(
    folder: Path, labels: Path, description: dict[str, Any], *, chill: bool, processes: int
) -> dict[Path, dict[str, Any]]:
    """Score a folder of predictions with nnU-Net's own evaluation; nothing is written.

    ``labels`` holds the reference segmentations, with the same file names; ``description`` is dataset.json's content.
    As in nnU-Net, ``chill`` accepts labels without a prediction. Returns for each prediction what summary.json would
    hold under ``metrics``.

    Raises:
        LightNetsError: files are missing, unreadable or of different shapes.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    if not labels.is_dir():
        raise LightNetsError(f"-gt {labels} is no folder; give the folder of reference segmentations")
    if not description:
        raise LightNetsError(
            f"no dataset.json beside {folder} or {labels}, so its labels are unknown; give it with -djfile"
        )
    ending = str(description.get("file_ending", ".nii.gz"))
    predictions = {path.name: path for path in sorted(folder.glob(f"*{ending}"))}
    if not predictions:
        raise LightNetsError(
            f"{folder} holds no summary.json and no predictions *{ending}; give an nnU-Net result folder"
        )
    labelled = {path.name for path in labels.glob(f"*{ending}")}
    if unknown := [name for name in predictions if name not in labelled]:
        raise LightNetsError(f"{folder}: no label in {labels} for {listed(unknown)}; give their labels with -gt")
    if (missing := sorted(labelled - set(predictions))) and not chill:
        raise LightNetsError(
            f"{folder}: no prediction for {listed(case_name(m) for m in missing)} of {labels}; predict them, or add "
            "--chill to compare the predicted cases only"
        )
    try:
        manager = LabelManager(description["labels"], description.get("regions_class_order"))
    except (AssertionError, RuntimeError) as error:
        raise LightNetsError(f"dataset.json of {folder}: {last_line(error)}; correct it, see -djfile") from error
    structures = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    jobs = [(labels / name, path, description, structures, manager.ignore_label) for name, path in predictions.items()]
    scored = for_each_case(score_case, jobs, processes, f"scoring {folder.name}")
    return dict(zip(predictions.values(), scored, strict=True))


def score_case(
    label_file: Path,
    prediction: Path,
    description: dict[str, Any],
    structures: list[Any],
    ignore_label: int | None,
) -> dict[str, Any]:
    """nnU-Net's metrics of one case, by its own names."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, label_or_region_to_key

    try:
        scored = compute_metrics(
            str(label_file), str(prediction), reader(label_file, description), structures, ignore_label
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LightNetsError(f"{prediction} cannot be scored against {label_file}: {last_line(error)}") from error
    return {
        label_or_region_to_key(structure): {metric: float(value) for metric, value in metrics.items()}
        for structure, metrics in scored["metrics"].items()
    }


def add_nsd(results: Sequence[Result], tolerance: float, labels: Path | None, processes: int) -> None:
    """Write ``metrics[structure]["NSD"]`` into every case.

    A structure in neither segmentation has NSD NaN, one in only one of them 0, as for Dice.

    Args:
        results: results whose predictions are still there.
        tolerance: in mm (in pixels for pictures, which have no spacing).
        labels: folder of reference segmentations; None takes those that nnU-Net scored against.
        processes: worker processes.

    Raises:
        LightNetsError: MONAI or a file is missing, or the labels are not those that were scored.
    """
    try:
        import monai.metrics  # noqa: F401
    except ImportError as error:
        raise LightNetsError(f"--nsd needs MONAI ({error}); pip install monai") from error
    cases = [(result, case) for result in results for case in result.cases.values()]
    jobs = []
    for result, case in cases:
        label_file = case.reference if labels is None else labels / case.prediction.name
        for file, remedy in (
            (label_file, "give the reference segmentations with -gt"),
            (case.prediction, "keep the predictions beside summary.json, or leave --nsd out"),
        ):
            if not file.is_file():
                raise LightNetsError(f"{result.name}: --nsd needs {file}, which is gone; {remedy}")
        voxels = {structure: int(values["n_ref"]) for structure, values in case.metrics.items()}
        jobs.append((label_file, case.prediction, result.dataset_json, voxels, result.ignore_label, tolerance))
    scores = for_each_case(case_nsd, jobs, processes, NSD)
    for (_, case), score in zip(cases, scores, strict=True):
        for structure, value in score.items():
            case.metrics[structure][NSD] = value


def case_nsd(
    label_file: Path,
    prediction: Path,
    description: dict[str, Any],
    voxels: dict[Structure, int],
    ignore_label: int | None,
    tolerance: float,
) -> dict[Structure, float]:
    """NSD of one case for each structure in ``voxels``, which says how many voxels of the reference were scored."""
    reference, spacing = read_segmentation(label_file, description)
    predicted, _ = read_segmentation(prediction, description)
    if reference.shape != predicted.shape:
        raise LightNetsError(f"{prediction} has shape {predicted.shape}, its reference {label_file} {reference.shape}")
    scored = np.ones(reference.shape, bool) if ignore_label is None else reference != ignore_label
    scores = {}
    for structure, count in voxels.items():
        in_reference = np.isin(reference, structure) & scored
        if int(in_reference.sum()) != count:
            raise LightNetsError(
                f"{label_file}: {in_reference.sum()} voxels of {structure_label(structure)}, not the {count} that were "
                "scored; give the scored labels with -gt, and dataset.json with -djfile if there is an ignore label"
            )
        scores[structure] = nsd(in_reference, np.isin(predicted, structure) & scored, spacing, tolerance)
    return scores


def nsd(
    reference: NDArray[np.bool_], predicted: NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> float:
    """Normalised surface Dice of two masks of equal shape, 2 or 3 axes; spacing (of each axis) and tolerance in mm."""
    import torch
    from monai.metrics import compute_surface_dice

    if not reference.any() or not predicted.any():
        return 0.0 if reference.any() or predicted.any() else math.nan
    # One voxel of padding: a structure that touches the border of the image has a surface there, too.
    masks = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in (predicted, reference)]  # (1, 1, *spatial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = compute_surface_dice(
            masks[0], masks[1], [tolerance], include_background=True, spacing=list(spacing), use_subvoxels=True
        )
    return float(score[0, 0])
