"""README's picture: what nnU-Net and two light networks predict for one case, from the recorded predictions.

    python benchmarks/pictures.py [--raw RAW]

Nothing is chosen by eye. The light networks are the two that compute least. The case is the median one: cases are
ordered by how well the light networks agree with nnU-Net (mean Dice of their label maps with nnU-Net's), and the middle
is taken. Nobody has compared these predictions with the truth here: labels of the test images are not recorded.

With ``--raw``, a folder in nnU-Net's raw format, the images lie below the outlines of 2D data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from skimage.filters import gaussian
from skimage.measure import marching_cubes

from nnunetv2_lightnets.comparison.volumes import read_image, read_segmentation
from nnunetv2_lightnets.pages.figures import COLOURS

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "accuracy"
PICTURE = ROOT / "docs" / "images" / "predictions.png"
TRAINERS = {"nnUNetTrainer": "nnU-Net", "nnUNetTrainerULite": "U-Lite", "nnUNetTrainerUltraLightUNet": "UltraLightUNet"}
# Budget of the trainers' names, and what stands above the row.
DATA = {
    "Dataset504_Hippocampus": ("_4epochs_250iters", "Hippocampus, 3D: anterior (orange), posterior (blue)"),
    "Dataset505_DSB2018Nuclei": ("_2epochs_250iters", "Nuclei, 2D: more (orange) or less (blue) than nnU-Net"),
}
LABELS = (COLOURS[1], COLOURS[0])
ONLY_HERE, ONLY_THERE = COLOURS[1], COLOURS[4]
LIGHT = np.array((0.6, -0.3, 0.74))  # where it comes from, in the order of the array's axes
SMOOTHED = 0.7  # voxels
CROP = 200  # pixels
WIDTH, DPI = 8.0, 150  # inches, and pixels in one


class Predictions:
    """The label maps of the test images of one data set, and each network's costs."""

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.description = json.loads((RECORDED / dataset / "dataset.json").read_text())
        folders = {name: RECORDED / dataset / f"{trainer}{DATA[dataset][0]}" for trainer, name in TRAINERS.items()}
        self.costs = {name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()}
        self.maps = {name: self._unpacked(folder / "predictions.zip") for name, folder in folders.items()}

    def _unpacked(self, archive: Path) -> dict[str, NDArray[Any]]:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(archive).extractall(folder)
            files = sorted(Path(folder).iterdir())
            return {file.name: read_segmentation(file, self.description)[0] for file in files}

    def agreement(self, case: str) -> float:
        """Mean Dice of the light networks' label maps with nnU-Net's."""
        reference, *others = (maps[case] for maps in self.maps.values())
        labels = [label for label in self.description["labels"].values() if label]
        return float(np.mean([dice(other == label, reference == label) for other in others for label in labels]))

    def median_case(self) -> str:
        """The case in the middle, by agreement."""
        cases = sorted(next(iter(self.maps.values())), key=self.agreement)
        return cases[len(cases) // 2]

    def title(self, name: str) -> str:
        """A network and what it costs."""
        parameters, macs = self.costs[name]["parameters"] / 1e6, self.costs[name]["macs"] / 1e9
        return f"{name}\n{parameters:.2f} M, {macs:.2f} GMAC"


def dice(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Dice of two masks; 1 if both are empty."""
    total = int(mask.sum() + other.sum())
    return 2 * int((mask & other).sum()) / total if total else 1.0


def surfaces(axes: Any, volume: NDArray[Any], reference: NDArray[Any]) -> None:
    """Draw the surface of each label of a (Z, Y, X) label map, lightly smoothed, at the scale of another."""
    triangles, colours = [], []
    for label, colour in enumerate(LABELS, start=1):
        vertices, faces, normals, _ = marching_cubes(
            gaussian(np.pad((volume == label).astype(float), 2), SMOOTHED), 0.5
        )
        light = np.clip(0.6 + 0.4 * normals[faces].mean(axis=1) @ LIGHT, 0.25, 1)
        triangles.append(vertices[faces][..., ::-1])  # x, y, z
        colours.append(np.array(to_rgb(colour)) * light[:, None])
    # One collection: what is nearer hides what is behind it only inside of one.
    shown = Poly3DCollection(
        np.concatenate(triangles), facecolors=np.concatenate(colours), antialiased=False, clip_on=False
    )
    axes.add_collection3d(shown)
    voxels = np.argwhere(reference)[:, ::-1] + 2  # as padded
    low, high = voxels.min(axis=0), voxels.max(axis=0)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(high - low, zoom=1.45)
    axes.view_init(elev=22, azim=-38)
    axes.set_axis_off()


def masks(axes: Axes, prediction: NDArray[Any], reference: NDArray[Any], image: NDArray[Any] | None) -> None:
    """Draw the middle of a picture's label map: coloured where it differs from another, or its outline on the image."""
    height, width = prediction.shape
    window = (slice((height - CROP) // 2, (height + CROP) // 2), slice((width - CROP) // 2, (width + CROP) // 2))
    here, there = prediction[window] > 0, reference[window] > 0
    if image is not None:
        axes.imshow(image[window], cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        axes.contour(here, [0.5], colors=[COLOURS[1]], linewidths=1.8)
    else:
        colours = [to_rgb(colour) for colour in ("#202020", "#d9d9d9", ONLY_HERE, ONLY_THERE)]
        kind = np.select([here & there, here, there], [1, 2, 3], 0)
        axes.imshow(np.array(colours)[kind], interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--raw", type=Path, help="folder of data sets (nnUNet_raw)")
    args = parser.parse_args()
    figure = Figure(figsize=(WIDTH, 6.9), facecolor="white")
    for row, dataset in enumerate(DATA):
        data = Predictions(dataset)
        case = data.median_case()
        name = case.removesuffix(data.description["file_ending"])
        print(f"{dataset}: {name}, agreement {data.agreement(case):.3f}")
        reference = next(iter(data.maps.values()))[case]
        for column, (network, maps) in enumerate(data.maps.items()):
            box = (column / 3 + 0.01, (0.56, 0.012)[row], 1 / 3 - 0.02, (0.28, 0.37)[row])
            if reference.ndim == 3:
                axes = figure.add_axes(box, projection="3d")
                surfaces(axes, maps[case], reference)
            else:
                axes = figure.add_axes(box)
                file = args.raw and next((args.raw / dataset / "imagesTs").glob(f"{name}_0000.*"))
                masks(axes, maps[case], reference, file and read_image(file, data.description))
            figure.text((column + 0.5) / 3, (0.925, 0.485)[row], data.title(network), size=15, ha="center", va="top")
        figure.text(0.5, (0.985, 0.545)[row], DATA[dataset][1], size=15, weight="bold", ha="center", va="top")
    FigureCanvasAgg(figure)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    main()
