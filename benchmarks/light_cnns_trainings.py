"""Short trainings of U-Lite and UltraLightUNet with nnU-Net's commands, predicted and evaluated on held-out cases.

    python benchmarks/light_cnns_trainings.py --folder WORK --raw RAW [--trainer NAME ...]

takes the data sets of CASES from RAW (in nnU-Net's raw format) and, for each of them and each trainer, runs

    nnUNetv2_plan_and_preprocess, nnUNetv2_train (fold 0), nnUNetv2_predict and nnUNetv2_evaluate_folder

in nnU-Net folders under WORK, with copies of nnU-Net's plans that have small patches and batches, and HELD_OUT cases of
fold 0's validation. A row of ``benchmarks/results/light_cnns_trainings.csv`` is written after each; what is there
already is not done again. The trainings are so short that they show that the trainers work, and nothing about accuracy.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy import HIPPOCAMPUS, NUCLEI, PLANS, Run, prepare
from network_costs import ULTRA_LIGHT
from nnunet_server import Commands
from recording import RESULTS, Record, Tables, argument_parser, link, machine, read_rows, table

TRAINERS = ("nnUNetTrainerULite", *ULTRA_LIGHT)
BUDGET = "_4epochs_50iters"
NUCLEI_RGB = replace(NUCLEI, dataset="Dataset508_DSB2018HistoRGB")
CASES = tuple(replace(run, budget=BUDGET, trainers=TRAINERS) for run in (NUCLEI, NUCLEI_RGB, HIPPOCAMPUS))
TRAININGS = RESULTS / "light_cnns_trainings.csv"
PAGE = "docs/ultralight_unet.md"
HELD_OUT = 4


def hold_out(commands: Commands, raw: Path, run: Run) -> None:
    """Plan and preprocess once, with few cases in fold 0's validation; a data set's own split is kept."""
    if (commands.preprocessed / run.dataset / f"{PLANS}.json").is_file():
        return
    folder = prepare(commands, raw, run)
    file = folder / "splits_final.json"
    if file.is_file():
        split = json.loads(file.read_text())[0]
    else:
        cases = sorted(path.name.partition(".")[0] for path in (raw / run.dataset / "labelsTr").iterdir())
        split = {"train": [case for i, case in enumerate(cases) if i % 5], "val": cases[::5]}
    split["val"] = split["val"][:HELD_OUT]
    file.write_text(json.dumps([split]))


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


def train_and_evaluate(commands: Commands, run: Run, trainer: str) -> dict[str, Any]:
    """One row of the table."""
    dataset, configuration = run.dataset, run.configuration
    commands.must("nnUNetv2_train", dataset, configuration, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu")
    images, labels, number = held_out(commands, dataset)
    out = commands.folder / f"{dataset}_{configuration}_{trainer}"
    model = ("-d", dataset, "-c", configuration, "-f", "0", "-tr", trainer, "-p", PLANS)
    workers = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta")
    commands.must("nnUNetv2_predict", "-i", images, "-o", out, *model, *workers)
    files = ("-djfile", out / "dataset.json", "-pfile", out / "plans.json")
    commands.must("nnUNetv2_evaluate_folder", labels, out, *files, "-np", "1")
    dice = json.loads((out / "summary.json").read_text())["foreground_mean"]["Dice"]
    row = {"data set": dataset, "configuration": configuration, "trainer": trainer, "held-out cases": number}
    return row | {"Dice": f"{dice:.4f}"}


def tables() -> Tables:
    """A row for each trainer, a column for each data set: Dice in percent."""
    rows = read_rows(TRAININGS)
    dice = {(row["data set"], row["trainer"]): f"{100 * float(row['Dice']):.1f}" for row in rows}
    shown = [
        {"trainer": f"`{name}`"}
        | {f"Dice, {run.dataset}, {run.configuration}": dice.get((run.dataset, name + BUDGET), "") for run in CASES}
        for name in TRAINERS
    ]
    return {PAGE: [*table(shown), "", link(PAGE, TRAININGS)]}


def main() -> None:
    """Train what is not recorded yet."""
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where nnU-Net's folders go")
    parser.add_argument("--raw", type=Path, required=True, help="nnUNet_raw with the data sets of CASES")
    parser.add_argument("--trainer", action="append", choices=TRAINERS, help="repeatable; all by default")
    parser.add_argument("--threads", type=int, default=1, help="more may hang forked predictions")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commands = Commands(arguments.folder.resolve(), threads=arguments.threads)
    record = Record(TRAININGS, "data set", "configuration", "trainer")
    for run in CASES:
        hold_out(commands, arguments.raw.resolve(), run)
        for name in arguments.trainer or TRAINERS:
            trainer = name + run.budget
            if (run.dataset, run.configuration, trainer) not in record:
                record.put(train_and_evaluate(commands, run, trainer) | machine())
    commands.close()


if __name__ == "__main__":
    main()
