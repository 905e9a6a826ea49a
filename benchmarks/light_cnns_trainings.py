"""Short trainings of U-Lite and UltraLightUNet with nnU-Net's commands, predicted and evaluated on held-out cases.

    python benchmarks/light_cnns_trainings.py --folder WORK --raw RAW [--budget _4epochs_50iters] [--trainer NAME ...]

takes the data sets of CASES from RAW (in nnU-Net's raw format) and, for each of them and each trainer, runs

    nnUNetv2_plan_and_preprocess, nnUNetv2_train (fold 0), nnUNetv2_predict and nnUNetv2_evaluate_folder

in nnU-Net folders under WORK, with copies of nnU-Net's plans that have small patches and batches, and HELD_OUT cases of
fold 0's validation. A row of ``benchmarks/results/light_cnns_trainings.csv`` is written after each; what is there
already is not done again. The table in ``docs/ultralight_unet.md`` is made of these rows. The trainings are so short
that they show that the trainers work, and nothing about accuracy.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from nnunet_server import Commands
from pages import DOCS, markdown, read_rows, write_table

from nnunetv2_lightnets.costs.worker import machine

CASES = (
    ("Dataset505_DSB2018Nuclei", "2d"),
    ("Dataset508_DSB2018HistoRGB", "2d"),
    ("Dataset504_Hippocampus", "3d_fullres"),
)
TRAINERS = (
    "nnUNetTrainerULite",
    "nnUNetTrainerUltraLightUNetT",
    "nnUNetTrainerUltraLightUNetS",
    "nnUNetTrainerUltraLightUNet",
    "nnUNetTrainerUltraLightUNetM",
    "nnUNetTrainerUltraLightUNetL",
)
RESULTS = Path(__file__).parent / "results" / "light_cnns_trainings.csv"
COLUMNS = ("data set", "configuration", "trainer", "held-out cases", "Dice")
PAGE = DOCS / "ultralight_unet.md"
PLANS = "nnUNetPlansSmall"
SMALL = {"2d": ([128, 128], 4), "3d_fullres": (None, 2)}  # patch (None: as planned) and batch
HELD_OUT = 4


def plan(commands: Commands, raw: Path, dataset: str, configuration: str) -> None:
    """Preprocess once, make the plans small, hold few cases out; a data set's own split is kept."""
    folder = commands.preprocessed / dataset
    if (folder / f"{PLANS}.json").is_file():
        return
    if not (commands.raw / dataset).exists():
        (commands.raw / dataset).symlink_to(raw / dataset)
    number = dataset[len("Dataset") :].partition("_")[0]
    commands.must("nnUNetv2_plan_and_preprocess", "-d", number, "-c", configuration, "-np", "1")
    own_split = raw / dataset / "splits_final.json"
    if own_split.is_file():
        split = json.loads(own_split.read_text())[0]
    else:
        cases = sorted(file.name.partition(".")[0] for file in (raw / dataset / "labelsTr").iterdir())
        split = {"train": [c for i, c in enumerate(cases) if i % 5], "val": cases[::5]}
    split["val"] = split["val"][:HELD_OUT]
    (folder / "splits_final.json").write_text(json.dumps([split]))
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    patch, batch = SMALL[configuration]
    chosen = plans["configurations"][configuration]
    chosen["patch_size"], chosen["batch_size"] = patch or chosen["patch_size"], batch
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))


def held_out(commands: Commands, dataset: str) -> tuple[Path, Path, int]:
    """Folders of the images and labels of fold 0's validation cases, and their number."""
    cases = json.loads((commands.preprocessed / dataset / "splits_final.json").read_text())[0]["val"]
    images, labels = (commands.folder / f"{dataset}_{part}" for part in ("images", "labels"))
    for folder in (images, labels):
        folder.mkdir(exist_ok=True)
    for case in cases:
        for source, target in (("imagesTr", images), ("labelsTr", labels)):
            for file in (commands.raw / dataset / source).glob(f"{case}[._]*"):
                shutil.copy(file, target)
    return images, labels, len(cases)


def train_and_evaluate(commands: Commands, dataset: str, configuration: str, trainer: str) -> dict[str, Any]:
    """One row of the table."""
    commands.must("nnUNetv2_train", dataset, configuration, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu")
    images, labels, number = held_out(commands, dataset)
    out = commands.folder / f"{dataset}_{configuration}_{trainer}"
    model = ("-d", dataset, "-c", configuration, "-f", "0", "-tr", trainer, "-p", PLANS)
    workers = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta")
    commands.must("nnUNetv2_predict", "-i", images, "-o", out, *model, *workers)
    files = ("-djfile", out / "dataset.json", "-pfile", out / "plans.json")
    commands.must("nnUNetv2_evaluate_folder", labels, out, *files, "-np", "1")
    dice = json.loads((out / "summary.json").read_text())["foreground_mean"]["Dice"]
    return dict(zip(COLUMNS, (dataset, configuration, trainer, number, f"{dice:.4f}"), strict=True))


def write_page(results: Path) -> None:
    """Put what is recorded on the page, in the order of CASES and TRAINERS."""

    def place(row: dict[str, str]) -> tuple[int, int]:
        name = row["trainer"].partition("_")[0]
        return CASES.index((row["data set"], row["configuration"])), TRAINERS.index(name)

    write_table(PAGE, Path(__file__).name, markdown(COLUMNS, sorted(read_rows(results), key=place)))


def main() -> None:
    """Train what is not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where nnU-Net's folders go")
    parser.add_argument("--raw", type=Path, required=True, help="nnUNet_raw with the data sets of CASES")
    parser.add_argument("--budget", default="_4epochs_50iters", help="suffix of the trainers' names")
    parser.add_argument("--trainer", action="append", choices=TRAINERS, help="repeatable; all by default")
    parser.add_argument("--threads", type=int, default=1, help="more may hang forked predictions")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = machine(torch.device("cpu"))
    described = {key: described[key] for key in ("processor", "cores", "threads", "torch")}
    commands = Commands(arguments.folder.resolve(), threads=arguments.threads)
    rows: list[dict[str, Any]] = [*read_rows(arguments.out)]
    done = {(row["data set"], row["configuration"], row["trainer"]) for row in rows}
    for dataset, configuration in CASES:
        plan(commands, arguments.raw.resolve(), dataset, configuration)
        for name in arguments.trainer or TRAINERS:
            trainer = name + arguments.budget
            if (dataset, configuration, trainer) in done:
                continue
            rows.append(train_and_evaluate(commands, dataset, configuration, trainer) | described)
            with arguments.out.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, [*COLUMNS, *described])
                writer.writeheader()
                writer.writerows(rows)
            if arguments.out == RESULTS:
                write_page(arguments.out)
    commands.close()


if __name__ == "__main__":
    main()
