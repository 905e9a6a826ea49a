"""Segmentations and images of a case, read as nnU-Net reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_lightnets.comparison.cases import Case
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line
from nnunetv2_lightnets.nnunet.folders import RAW

# Where a data set keeps the images of its labels.
_IMAGES_OF = {"labelsTr": "imagesTr", "labelsTs": "imagesTs"}


def image_file(case: Case, label_file: Path, images: Path | None) -> Path | None:
    """The first channel of a case's image; None if it is not where nnU-Net keeps images.

    Without a folder ``images``, that is beside the labels, or in nnUNet_raw for nnU-Net's gt_segmentations.
    """
    if images is None:
        if label_file.parent.name in _IMAGES_OF:
            images = label_file.parent.with_name(_IMAGES_OF[label_file.parent.name])
        elif label_file.parent.name == "gt_segmentations" and (raw := os.environ.get(RAW)):
            images = Path(raw, label_file.parent.parent.name, "imagesTr")
        else:
            return None
    return next(iter(sorted(images.glob(f"{case.name}_0000.*"))), None)


def read_segmentation(file: Path, description: Mapping[str, Any]) -> tuple[NDArray[Any], tuple[float, ...]]:
    """A label map (Z, Y, X), or (Y, X) for 2D data and single slices, and its spacing in the same order.

    Raises:
        LightNetsError: the file cannot be read.
    """
    with _readable(file):
        segmentation, properties = reader(file, description).read_seg(str(file))
    spacing = tuple(float(s) for s in properties["spacing"])  # nnU-Net's order, that of the array
    array = np.asarray(segmentation)[0]  # (1, Z, Y, X) -> (Z, Y, X)
    if array.shape[0] == 1:
        array, spacing = array[0], spacing[1:]
    return array, spacing


def read_image(file: Path, description: Mapping[str, Any]) -> NDArray[np.float32]:
    """An image for the eye, between 0 and 1: (Z, Y, X) or (Y, X), with a last axis of 3 for colour pictures.

    Raises:
        LightNetsError: the file cannot be read.
    """
    with _readable(file):
        image = np.asarray(reader(file, description).read_images([str(file)])[0], dtype=np.float32)  # (C, Z, Y, X)
    image = np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image[0]  # (Z, Y, X) or (Z, Y, X, 3)
    image = image[0] if image.shape[0] == 1 else image
    low, high = np.percentile(image, (0.5, 99.5))
    return np.asarray(np.clip((image - low) / max(high - low, 1e-6), 0, 1), dtype=np.float32)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every reader has its own errors
        raise LightNetsError(f"{file} cannot be read: {last_line(error)}") from error


_READERS: dict[tuple[str, str], Any] = {}  # by ending and dataset.json's wish


def reader(file: Path, description: Mapping[str, Any]) -> Any:
    """nnU-Net's reader for a file of a data set; which one that is, is tried once for each kind of file."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    ending = ".nii.gz" if file.name.endswith(".nii.gz") else file.suffix
    kind = ending, str(description.get("overwrite_image_reader_writer"))
    if kind not in _READERS:
        asked = dict(zip(("file_ending", "overwrite_image_reader_writer"), kind, strict=True))
        # Several readers take TIFF files: only reading one tells whether it is a picture or a volume.
        example = str(file) if ending.startswith(".tif") else None
        _READERS[kind] = determine_reader_writer_from_dataset_json(asked, example, verbose=False)
    return _READERS[kind]()


def unit_of_spacing(file: Path, description: Mapping[str, Any]) -> str:
    """``mm``, or ``px`` for pictures, whose files hold no spacing."""
    return "px" if type(reader(file, description)).__name__ == "NaturalImage2DIO" else "mm"
