"""nnU-Net's three folders, which it finds by environment variables."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_lightnets.errors import LightNetsError

RAW, PREPROCESSED, RESULTS = FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def dataset_folder(dataset: str) -> Path:
    """The folder of a planned data set, by its ID or name.

    Raises:
        LightNetsError: there is none, or no variable that says where to look.
    """
    root = os.environ.get(PREPROCESSED)
    if not root or not Path(root).is_dir():
        raise LightNetsError(f"{PREPROCESSED} is not set to a folder, so -d {dataset} cannot be found; set it")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else dataset
    found = sorted(path for path in Path(root).glob(pattern) if path.is_dir())
    if len(found) != 1:
        what = "no" if not found else f"{len(found)} times a"
        raise LightNetsError(f"there is {what} data set {dataset} in {root}; plan it with nnUNetv2_plan_experiment")
    return found[0]


@contextmanager
def temporary_folders() -> Iterator[Path]:
    """All three in a temporary folder, so that a trainer made for its costs writes nothing into the user's.

    nnU-Net reads where its folders are at each use.
    """
    with tempfile.TemporaryDirectory(prefix="lightnets_") as folder:
        before = {name: os.environ[name] for name in FOLDERS if name in os.environ}
        try:
            for name in FOLDERS:
                os.environ[name] = str(Path(folder, name))
                Path(folder, name).mkdir()
            yield Path(folder)
        finally:
            for name in FOLDERS:
                os.environ.pop(name, None)
            os.environ.update(before)
