"""What the planner makes of data sets for each network: patch, batch size, estimated memory, and memory as measured.

    nnUNet_preprocessed=FOLDER python benchmarks/plans.py [--memory GB] [--ids 504 505 508]

The data sets must have been planned by nnU-Net (their plans are only read). Each case runs in a process of its own, as
in training_memory.py. Rows are written one by one into ``benchmarks/results/plans.csv``; those there are not redone.
The table of ``docs/planning.md`` is made of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from pages import DOCS, markdown, read_rows, write_table
from training_memory import ALLOCATOR, measured_memory

from nnunetv2_lightnets.costs.trainers import find_trainer_class
from nnunetv2_lightnets.files import read_json
from nnunetv2_lightnets.networks import network_entry
from nnunetv2_lightnets.nnunet.folders import dataset_folder
from nnunetv2_lightnets.nnunet.plans import Setting
from nnunetv2_lightnets.plans.planner import Planner, plans_name

RESULTS = Path(__file__).parent / "results" / "plans.csv"
PAGE = DOCS / "planning.md"
TRAINERS = (
    "nnUNetTrainerLightMUNet",
    "nnUNetTrainerLightMUNetS",
    "nnUNetTrainerLightMUNetT",
    "nnUNetTrainerULite",
    "nnUNetTrainerUltraLightUNetT",
    "nnUNetTrainerUltraLightUNetS",
    "nnUNetTrainerUltraLightUNet",
    "nnUNetTrainerUltraLightUNetM",
    "nnUNetTrainerUltraLightUNetL",
    "nnUNetTrainerSwinUMambaScratch",
    "nnUNetTrainerSwinUMambaDScratch",
)
COLUMNS = (
    "data set",
    "configuration",
    "trainer",
    "memory_GB",
    "nnU-Net's patch",
    "nnU-Net's batch",
    "patch",
    "batch",
    "estimated_MB",
    "measured_MB",
    "estimated_over_measured",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", nargs="+", default=["504", "505", "508"])
    parser.add_argument("--memory", type=float, default=2.0)
    parser.add_argument("--case", nargs=2, metavar=("ID", "TRAINER"), help="this one alone, as JSON; used by itself")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(*args.case, args.memory)))
        return 0
    done = {(row["data set"], row["trainer"]) for row in read_rows(RESULTS)}
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not done:
            table.writeheader()
        for trainer in TRAINERS:
            for dataset in args.ids:
                if (dataset_folder(dataset).name, trainer) in done:
                    continue
                command = [sys.executable, __file__, "--memory", str(args.memory), "--case", dataset, trainer]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
                row = json.loads(run.stdout.splitlines()[-1])
                table.writerow(row)
                file.flush()
                print(*row.values(), sep="  ")
    write_page(RESULTS)
    return 0


def write_page(results: Path) -> None:
    """Put what is recorded on the page, by data set."""
    rows = sorted(read_rows(results), key=lambda row: (row["data set"], TRAINERS.index(row["trainer"])))
    names = {"estimated_MB": "estimate (MB)", "measured_MB": "measured (MB)"}
    columns = [names.get(c, c) for c in COLUMNS if c not in ("memory_GB", "estimated_over_measured")]
    lines = [{names.get(key, key): value.replace(" x ", " × ") for key, value in row.items()} for row in rows]
    write_table(PAGE, Path(__file__).name, markdown(columns, lines))


def case(dataset: str, trainer: str, memory: float) -> dict[str, object]:
    """Plan 3d_fullres where the data set and the network have it, else 2d, and train two steps so."""
    torch.set_num_threads(1)
    folder = dataset_folder(dataset)
    base, dataset_json = (read_json(folder / name, "plan it") for name in ("nnUNetPlans.json", "dataset.json"))
    trainer_class = find_trainer_class(trainer)
    volumes = "3d_fullres" in base["configurations"] and 3 in network_entry(trainer_class.network_name).spatial_dims
    configuration = "3d_fullres" if volumes else "2d"
    before = Setting("", base, dataset_json, configuration)
    planner = Planner(trainer_class, base, dataset_json, plans_name(trainer_class), memory)
    (planned,) = planner.plan([configuration])
    setting = Setting("", planner.plans, dataset_json, configuration)
    measured = measured_memory(trainer, setting, planned.batch_size)
    patches = [" x ".join(map(str, patch)) for patch in (before.patch, planned.patch)]
    megabytes = [round(n / 2**20) for n in (planned.memory, measured)]
    values = (folder.name, configuration, trainer, memory, patches[0], before.batch_size, patches[1])
    ratio = round(planned.memory / measured, 2)
    return dict(zip(COLUMNS, (*values, planned.batch_size, *megabytes, ratio), strict=True))


if __name__ == "__main__":
    sys.exit(main())
