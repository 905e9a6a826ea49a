"""nnU-Net's real commands for end-to-end tests: their own folders, few processes, real MRI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ID = 801
DATASET = f"Dataset{ID}_MNIBlocks"


@dataclass
class NNUNet:
    """Three data folders of nnU-Net, and its commands run in them, those of ``python``'s environment."""

    folder: Path
    python: Path = Path(sys.executable)

    def __post_init__(self) -> None:
        for name in ("raw", "preprocessed", "results"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    @property
    def preprocessed(self) -> Path:
        return self.folder / "preprocessed"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def environment(self) -> dict[str, str]:
        # No nnUNet_extTrainer: the commands must find our trainers without it.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        return kept | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1",
        }

    def run(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One command, as a user types it, from another folder; its outcome is left to the caller."""
        executable = self.python.parent / command
        return subprocess.run(
            [str(executable), *arguments],
            env=self.environment | environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    def start(self, command: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """One command that goes on while the caller reads its output; all its processes are in one group."""
        executable = self.python.parent / command
        return subprocess.Popen(
            [str(executable), *arguments],
            env=self.environment | environment | {"PYTHONUNBUFFERED": "1"},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def must(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = self.run(command, *arguments, **environment)
        assert done.returncode == 0, f"{command} {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def model(self, trainer: str, configuration: str, dataset: str = DATASET) -> Path:
        return self.results / dataset / f"{trainer}__nnUNetPlans__{configuration}"


def write_mni_blocks(
    raw: Path, *, block: tuple[int, int, int] = (24, 32, 24), n_train: int = 6, n_test: int = 2
) -> None:
    """A small data set of real MRI: blocks of one hemisphere of the MNI152 template, white matter to be found."""
    import nibabel
    from nilearn import datasets

    template = datasets.load_mni152_template(resolution=2)
    image = template.get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=2).get_fdata(dtype=np.float32) > 0.5
    folder = raw / DATASET
    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / sub).mkdir(parents=True)
    starts = [(50, y, z) for z in (20, 44) for y in (12, 38, 64, 84)][: n_train + n_test]
    for i, start in enumerate(starts):
        part = "Tr" if i < n_train else "Ts"
        cut = tuple(slice(s, s + size) for s, size in zip(start, block, strict=True))
        nibabel.save(
            nibabel.Nifti1Image(image[cut], template.affine), folder / f"images{part}" / f"case_{i}_0000.nii.gz"
        )
        nibabel.save(
            nibabel.Nifti1Image(white[cut].astype(np.uint8), template.affine),
            folder / f"labels{part}" / f"case_{i}.nii.gz",
        )
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "white matter": 1},
        "numTraining": n_train,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
