"""Reading nnU-Net result folders: scores per case, from any of the places where nnU-Net leaves them.

nnU-Net writes a ``summary.json`` into every validation folder (``fold_x/validation``), every folder that
``nnUNetv2_evaluate_folder`` has seen, and the folders of ``nnUNetv2_find_best_configuration``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_lightnets.comparison.cases import Case, Result, case_name
from nnunetv2_lightnets.comparison.scoring import score_folder
from nnunetv2_lightnets.comparison.summary import SUMMARY, checked_metrics, read_summary, structures_of
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line, read_json

_TRAINER_FOLDER = re.compile(r"^(?P<trainer>[^_].*?)__(?P<plans>.+?)__(?P<configuration>.+)$")
_FOLD_FOLDER = re.compile(r"^fold_(?P<fold>\d+|all)$")


def split_name(argument: str) -> tuple[str | None, Path]:
    """``name=folder`` or ``folder``; a folder whose own name holds ``=`` is taken as it is."""
    if "=" in argument and not Path(argument).exists():
        name, _, folder = argument.partition("=")
        if not name.strip() or not folder:
            raise LightNetsError(f"{argument!r} is neither a folder nor NAME=FOLDER")
        return name.strip(), Path(folder)
    return None, Path(argument)


def read_results(
    arguments: Sequence[str],
    *,
    folds: Sequence[str] | None = None,
    labels: Path | None = None,
    dataset_json: Path | None = None,
    chill: bool = False,
    processes: int = 1,
) -> list[Result]:
    """Read every result of a command line.

    Args:
        arguments: ``FOLDER`` or ``NAME=FOLDER`` each: a trainer folder, a fold folder, a folder with summary.json,
            a summary.json, or a folder of predictions (then ``labels`` is needed).
        folds: folds to read from trainer folders; None for all that are there.
        labels: folder of reference segmentations for folders of predictions that hold no summary.json.
        dataset_json: the data set's description, where none lies beside the predictions or the labels.
        chill: as in nnU-Net: a label without a prediction is not an error.
        processes: worker processes that score predictions.

    Raises:
        LightNetsError: a folder cannot be read, or two results have the same name or are the same folder.
    """
    named = [split_name(argument) for argument in arguments]
    before: dict[Path, str] = {}
    for argument, (_, folder) in zip(arguments, named, strict=True):
        if not folder.exists():
            raise LightNetsError(f"{folder} does not exist; give an nnU-Net result folder as FOLDER or NAME=FOLDER")
        if (same := before.get(folder.resolve())) is not None:
            raise LightNetsError(f"{same} and {argument} are the same folder; compare different ones")
        before[folder.resolve()] = argument
    return [
        read_result(
            folder, name, folds=folds, labels=labels, dataset_json=dataset_json, chill=chill, processes=processes
        )
        for name, (_, folder) in zip(_names(named), named, strict=True)
    ]


def _names(named: Sequence[tuple[str | None, Path]]) -> list[str]:
    """One name for each folder: the user's, else the trainer's, else trainer, plans and configuration, else refuse."""
    short, long = [], []
    for name, folder in named:
        parts = reversed(folder.resolve().parts)
        place = next(part for part in parts if part not in (SUMMARY, "validation") and not _FOLD_FOLDER.match(part))
        trainer = _TRAINER_FOLDER.match(place)
        short.append(name or (trainer["trainer"] if trainer else place))
        long.append(name or place)
    names = [s if short.count(s) == 1 else full for s, full in zip(short, long, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise LightNetsError(f"two results are named {name!r}; name them, as in NAME=FOLDER")
    return names


def read_result(
    folder: Path,
    name: str,
    *,
    folds: Sequence[str] | None = None,
    labels: Path | None = None,
    dataset_json: Path | None = None,
    chill: bool = False,
    processes: int = 1,
) -> Result:
    """Read one result; arguments as in :func:`read_results`."""
    description = _read_dataset_json(folder, dataset_json, labels)
    sources = _summaries(folder, folds)
    cases: dict[str, Case] = {}
    if sources:
        for fold, file in sources:
            for case in read_summary(file, fold):
                if case.name in cases:
                    raise LightNetsError(
                        f"{name}: case {case.name} is in fold {cases[case.name].fold} and in fold {fold} of {folder}; "
                        "each case must be in one validation fold, check splits_final.json"
                    )
                cases[case.name] = case
    elif labels is None:
        raise LightNetsError(
            f"{folder} holds neither summary.json nor fold_*/validation/summary.json; for a folder of predictions, "
            "add -gt LABELS_FOLDER"
        )
    else:
        for path, scores in score_folder(folder, labels, description, chill=chill, processes=processes).items():
            metrics = checked_metrics(scores, f"{folder}, {path.name}")
            case = Case(case_name(path), _fold_of(path), labels / path.name, path, metrics)
            cases[case.name] = case
    structures = structures_of(name, cases.values())
    return Result(name, folder, cases, structures, description, _budgets([file for _, file in sources]))


def _summaries(folder: Path, folds: Sequence[str] | None) -> list[tuple[str | None, Path]]:
    """The summary.json files of a result and the folds they belong to; empty if there are none."""
    if folder.is_file():
        if folder.suffix != ".json":
            raise LightNetsError(f"{folder} is no folder and no {SUMMARY}; give an nnU-Net result folder")
        return [(_fold_of(folder), folder)]
    found = {
        match["fold"]: path / "validation" / SUMMARY
        for path in folder.iterdir()
        if (match := _FOLD_FOLDER.match(path.name))
    }
    if found:
        found = {fold: file for fold, file in found.items() if file.is_file()}
        if folds is None:  # fold_all was trained on the cases that it validates on
            folds = sorted(found.keys() - {"all"}, key=int)
        for fold in folds:
            if fold not in found:
                raise LightNetsError(
                    f"{folder} has no fold_{fold}/validation/{SUMMARY}; finish the fold with "
                    f"nnUNetv2_train ... {fold} --val, or choose others with -f"
                )
        if not folds:
            raise LightNetsError(
                f"{folder} has no fold_*/validation/{SUMMARY} of a fold that was held out; finish a fold with "
                "nnUNetv2_train ... --val"
            )
        return [(fold, found[fold]) for fold in folds]
    for file in (folder / SUMMARY, folder / "validation" / SUMMARY):
        if file.is_file():
            return [(_fold_of(file), file)]
    return []


def _fold_of(file: Path) -> str | None:
    """The fold in a path, or None."""
    matches = (_FOLD_FOLDER.match(folder.name) for folder in file.resolve().parents)
    return next((match["fold"] for match in matches if match), None)


def _read_dataset_json(folder: Path, given: Path | None, labels: Path | None) -> dict[str, Any]:
    """The data set's description: the given one, else one beside the predictions, above them, or above the labels."""
    if given is not None:
        content = read_json(given, "give the data set's dataset.json")
        if not isinstance(content.get("labels"), dict):
            raise LightNetsError(f"-djfile {given} declares no labels; give the data set's dataset.json")
        return content
    places = [folder, *folder.resolve().parents[:3], *([] if labels is None else [labels, labels.resolve().parent])]
    for file in (place / "dataset.json" for place in places):
        if file.is_file():
            content = read_json(file, "restore it from the raw data set, or give another with -djfile")
            if isinstance(content.get("labels"), dict):
                return content
    return {}


def _budgets(summaries: Sequence[Path]) -> tuple[str, ...]:
    """What each fold was trained for, as nnU-Net noted it in debug.json; nothing where it did not."""
    budgets: list[str] = []
    for summary in summaries:
        try:
            noted = json.loads((summary.parent.parent / "debug.json").read_text(encoding="utf-8"))
            numbers = [int(noted[key]) for key in ("num_epochs", "num_iterations_per_epoch", "batch_size")]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        budgets.append("{} epochs x {} iterations, batch {}".format(*numbers))
    return tuple(dict.fromkeys(budgets))


def read_subjects(file: Path) -> dict[str, str]:
    """Subject of each case, from a CSV file with the columns ``case`` and ``subject`` or a JSON object.

    Raises:
        LightNetsError: there is no such file, or it says something else.
    """
    wanted = "--subjects takes a CSV file with the columns case and subject, or a JSON object from case to subject"
    if file.suffix == ".json":
        return {str(case): str(subject) for case, subject in read_json(file, wanted).items()}
    try:
        rows = csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise LightNetsError(f"{file} cannot be read: {last_line(error)}; {wanted}") from error
    if not {"case", "subject"} <= set(rows.fieldnames or ()):
        raise LightNetsError(f"{file} has no such columns; {wanted}")
    return {row["case"]: row["subject"] for row in rows}
