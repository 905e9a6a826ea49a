"""Short trainings of U-Lite and UltraLightUNet with nnU-Net's commands, predicted and evaluated on held-out cases.

    python benchmarks/light_cnns_trainings.py --folder WORK --raw RAW [--budget _5epochs_20iters] [--trainer NAME ...]

takes the data sets of CASES from RAW (in nnU-Net's raw format) and, for each of them and each trainer, runs

    nnUNetv2_plan_and_preprocess, nnUNetv2_train (fold 0), nnUNetv2_predict and nnUNetv2_evaluate_folder

in nnU-Net folders under WORK. A row of ``benchmarks/results/light_cnns_trainings.csv`` is written after each; what is
there already is not done again. ``nnUNetTrainer`` is nnU-Net's own, with the same budget. The scores show that
recipes learn, at a budget far below nnU-Net's 1000 epochs; they rank nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nnunetv2_lightnets.benchmark.worker import machine

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
    "nnUNetTrainer",
)
RESULTS = Path(__file__).parent / "results" / "light_cnns_trainings.csv"
COLUMNS = ("data set", "configuration", "trainer", "held-out cases", "Dice", "training minutes", "prediction seconds")


class NNUNet:
    """nnU-Net's commands, with their folders."""

    def __init__(self, folder: Path, raw: Path, threads: int) -> None:
        self.raw, self.preprocessed, self.results = raw, folder / "preprocessed", folder / "results"
        for path in (self.preprocessed, self.results):
            path.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "nnUNet_raw": str(raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1",
            "OMP_NUM_THREADS": str(threads),
        }

    def run(self, command: str, *arguments: str) -> float:
        """Seconds that one command took."""
        start = time.perf_counter()
        subprocess.run([Path(sys.executable).parent / command, *arguments], env=self.environment, check=True)
        return time.perf_counter() - start


def plan(nnunet: NNUNet, dataset: str, configuration: str) -> None:
    """Plan and preprocess, once; the data set's own split takes the place of nnU-Net's."""
    folder = nnunet.preprocessed / dataset
    if (folder / f"nnUNetPlans_{configuration}").is_dir():
        return
    number = dataset[len("Dataset") :].partition("_")[0]
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", configuration, "-np", "1")
    split = nnunet.raw / dataset / "splits_final.json"
    if split.is_file():
        shutil.copy(split, folder)


def held_out(nnunet: NNUNet, dataset: str) -> tuple[Path, Path, int]:
    """Folders of the images and labels of fold 0's validation cases, and their number."""
    cases = json.loads((nnunet.preprocessed / dataset / "splits_final.json").read_text())[0]["val"]
    images, labels = (nnunet.results / f"{dataset}_{part}" for part in ("images", "labels"))
    for folder in (images, labels):
        folder.mkdir(exist_ok=True)
    for case in cases:
        for source, target in (("imagesTr", images), ("labelsTr", labels)):
            for file in (nnunet.raw / dataset / source).glob(f"{case}[._]*"):
                shutil.copy(file, target)
    return images, labels, len(cases)


def train_and_evaluate(nnunet: NNUNet, dataset: str, configuration: str, trainer: str) -> dict[str, Any]:
    """One row of the table."""
    training = nnunet.run("nnUNetv2_train", dataset, configuration, "0", "-tr", trainer, "-device", "cpu")
    images, labels, number = held_out(nnunet, dataset)
    out = nnunet.results / f"{dataset}_{configuration}_{trainer}"
    model = ("-d", dataset, "-c", configuration, "-f", "0", "-tr", trainer)
    workers = ("-device", "cpu", "-npp", "1", "-nps", "1")
    prediction = nnunet.run("nnUNetv2_predict", "-i", str(images), "-o", str(out), *model, *workers)
    files = ("-djfile", str(out / "dataset.json"), "-pfile", str(out / "plans.json"))
    nnunet.run("nnUNetv2_evaluate_folder", str(labels), str(out), *files)
    dice = json.loads((out / "summary.json").read_text())["foreground_mean"]["Dice"]
    values = (dataset, configuration, trainer, number, f"{dice:.4f}", f"{training / 60:.1f}", f"{prediction:.0f}")
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Train what is not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where nnU-Net's folders go")
    parser.add_argument("--raw", type=Path, required=True, help="nnUNet_raw with the data sets of CASES")
    parser.add_argument("--budget", default="_5epochs_20iters", help="suffix of the trainers' names")
    parser.add_argument("--trainer", action="append", choices=TRAINERS, help="repeatable; all by default")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = machine(torch.device("cpu"))
    described = {key: described[key] for key in ("processor", "cores", "threads", "torch")}
    nnunet = NNUNet(arguments.folder.resolve(), arguments.raw.resolve(), arguments.threads)
    rows: list[dict[str, Any]] = []
    if arguments.out.is_file():
        with arguments.out.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    done = {(row["data set"], row["configuration"], row["trainer"]) for row in rows}
    for dataset, configuration in CASES:
        plan(nnunet, dataset, configuration)
        for name in arguments.trainer or TRAINERS:
            trainer = name + arguments.budget
            if (dataset, configuration, trainer) in done:
                continue
            rows.append(train_and_evaluate(nnunet, dataset, configuration, trainer) | described)
            with arguments.out.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, [*COLUMNS, *described])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
