"""nnU-Net's configurations with our trainers, by the script that makes the documentation's table.

Every command is interrupted, resumed, validated and predicted for real; only the imports are done once for all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import configuration_data as data
import configurations as matrix
import nibabel
import numpy as np
import pytest
from nnunet_server import Commands
from recording import read_rows

ROOT = Path(__file__).resolve().parents[2]

DATA = Path(os.environ.get("LIGHTNETS_DATA", ROOT.parent / "shared" / "data"))


def write_tissue_blocks(folder: Path, n: int = 11, side: int = 18) -> None:
    """Real MRI with two labels: blocks of the MNI152 template, grey (1) and white matter (2)."""
    from nilearn import datasets

    template = datasets.load_mni152_template(resolution=2)
    image = template.get_fdata(dtype=np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[datasets.load_mni152_gm_template(resolution=2).get_fdata(dtype=np.float32) > 0.5] = 1
    label[datasets.load_mni152_wm_template(resolution=2).get_fdata(dtype=np.float32) > 0.5] = 2
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for i in range(n):
        corner = (50, 14 + 18 * (i % 4), 18 + 14 * (i // 4))
        cut = tuple(slice(start, start + side) for start in corner)
        nibabel.save(
            nibabel.Nifti1Image(image[cut], template.affine), folder / "imagesTr" / f"block_{i:02d}_0000.nii.gz"
        )
        nibabel.save(nibabel.Nifti1Image(label[cut], template.affine), folder / "labelsTr" / f"block_{i:02d}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """nnU-Net's folders with small data sets, planned and preprocessed."""
    pytest.importorskip("nilearn")
    folder = tmp_path_factory.mktemp("configurations")
    write_tissue_blocks(folder / "source")
    commands = Commands(folder / "nnU-Net")
    data.prepare(commands, ["Plain", "RegionsIgnore", "Small"], folder / "source", None)
    yield commands
    commands.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "cell"),
    [
        ("nnUNetTrainerULite", "3d_lowres, fold all -> 3d_cascade_fullres"),
        ("nnUNetTrainerLightMUNetT", "2d, regions and ignore label"),
        ("nnUNetTrainerUltraLightUNetT", "3d, bottleneck of one voxel, batch size 1"),
        ("nnUNetTrainerULite", "best configuration, ensemble, postprocessing"),
    ],
)
def test_a_cell_runs(commands: Commands, trainer: str, cell: str) -> None:
    row = matrix.run_cell(cell, commands, trainer + matrix.BUDGET)
    assert row == {"trainer": trainer, "cell": cell, "outcome": "run", "reason": ""}


@pytest.mark.slow
def test_a_trainer_for_2d_refuses_3d_in_one_line_and_writes_nothing(commands: Commands) -> None:
    trainer = "nnUNetTrainerSwinUMambaDScratch" + matrix.BUDGET
    row = matrix.run_cell("3d_fullres", commands, trainer)
    assert row["outcome"] == "refused"
    assert "does not exist in 3D" in row["reason"]
    assert "nnUNetTrainerLightMUNet" in row["reason"]
    assert not list(commands.results.glob(f"*/{trainer}*"))


@pytest.mark.slow
def test_a_command_that_fails_fails_its_cell(commands: Commands) -> None:
    row = matrix.run_cell("3d_fullres, regions", commands, "nnUNetTrainerULite" + matrix.BUDGET)
    assert row["outcome"] == "failed"  # that data set was not made
    assert "Regions" in row["reason"] or "997" in row["reason"]


def test_scribbles_keep_a_few_slices_along_each_axis() -> None:
    label = np.ones((30, 40, 50), np.uint8)
    sparse = data.scribble(label, np.random.default_rng(0))
    assert set(np.unique(sparse)) == {1, data.IGNORE_IN_REGIONS}
    outside = (30 - 1) * (40 - 1) * (50 - 2)  # 1, 1 and 2 slices are kept
    assert int((sparse == data.IGNORE_IN_REGIONS).sum()) == outside


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("trainer", matrix.TRAINERS)
def test_every_cell_runs_or_is_refused(trainer: str, tmp_path: Path) -> None:
    import tarfile

    archives = [DATA / f"{name}.tar.xz" for name in ("Dataset504_Hippocampus", "Dataset508_DSB2018HistoRGB")]
    if not all(file.is_file() for file in archives):
        pytest.skip(f"no data sets in {DATA} (set LIGHTNETS_DATA)")
    for file in archives:
        with tarfile.open(file) as opened:
            opened.extractall(tmp_path, filter="data")
    volumes, rgb = (str(tmp_path / file.name.removesuffix(".tar.xz")) for file in archives)
    out = tmp_path / "rows.csv"
    where = ["--folder", str(tmp_path / "nnU-Net"), "--volumes", volumes, "--rgb", rgb]
    matrix.main([*where, "--trainer", trainer, "--out", str(out)])
    rows = read_rows(out)
    assert len(rows) == len(matrix.CELLS)
    assert not [row for row in rows if row["outcome"] == "failed"]
    refused = {row["cell"] for row in rows if row["outcome"] == "refused"}
    assert all(cell.startswith("3d") for cell in refused)
    assert bool(refused) == ("Swin" in trainer)
