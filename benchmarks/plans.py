"""What the planner makes of data sets for each network: patch, batch size, estimated memory, and memory as measured.

    nnUNet_preprocessed=FOLDER python benchmarks/plans.py [--memory GB] [--ids 504 505 508]

The data sets must have been planned by nnU-Net (their plans are only read). Each case runs in a process of its own, as
in training_memory.py. Rows are written one by one into ``benchmarks/results/plans.csv``; those there are not redone.
"""

from __future__ import annotations

import json

import torch
from network_costs import LIGHT_M, ULTRA_LIGHT
from recording import RESULTS, Record, Tables, argument_parser, link, read_rows, table
from training_memory import SWIN, in_own_process, measured_memory

from nnunetv2_lightnets.costs.trainers import find_trainer_class
from nnunetv2_lightnets.files import read_json
from nnunetv2_lightnets.networks import network_entry
from nnunetv2_lightnets.nnunet.folders import dataset_folder
from nnunetv2_lightnets.nnunet.plans import Setting
from nnunetv2_lightnets.plans.planner import Planner, plans_name

PLANNED = RESULTS / "plans.csv"
PAGE = "docs/planning.md"
TRAINERS = (*LIGHT_M, "nnUNetTrainerULite", *ULTRA_LIGHT, *SWIN)
SHOWN = (  # of each family
    ("Dataset504_Hippocampus", "nnUNetTrainerLightMUNet"),
    ("Dataset504_Hippocampus", "nnUNetTrainerLightMUNetS"),
    ("Dataset504_Hippocampus", "nnUNetTrainerULite"),
    ("Dataset505_DSB2018Nuclei", "nnUNetTrainerLightMUNet"),
    ("Dataset505_DSB2018Nuclei", "nnUNetTrainerUltraLightUNet"),
    ("Dataset505_DSB2018Nuclei", "nnUNetTrainerSwinUMambaScratch"),
    ("Dataset505_DSB2018Nuclei", "nnUNetTrainerSwinUMambaDScratch"),
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


def main() -> None:
    """Plan and measure what is not recorded yet."""
    parser = argument_parser(__doc__)
    parser.add_argument("--ids", nargs="+", default=["504", "505", "508"])
    parser.add_argument("--memory", type=float, default=2.0)
    parser.add_argument("--case", nargs=2, metavar=("ID", "TRAINER"), help="this one alone, as JSON; used by itself")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(*args.case, args.memory)))
        return
    record = Record(PLANNED, "data set", "trainer")
    for trainer in TRAINERS:
        for dataset in args.ids:
            if (dataset_folder(dataset).name, trainer) not in record:
                record.put(in_own_process(__file__, "--memory", str(args.memory), "--case", dataset, trainer))


def tables() -> Tables:
    """Some of the recorded plans."""
    by_name = {(row["data set"], row["trainer"]): row for row in read_rows(PLANNED)}
    rows = []
    for name in SHOWN:
        row = by_name[name]
        shown = {"data set": row["data set"], "configuration": row["configuration"], "trainer": f"`{row['trainer']}`"}
        for whose in ("nnU-Net's ", ""):
            size = row[f"{whose}patch"].replace(" x ", "×")
            shown[f"{whose}patch and batch"] = f"{size}, {row[f'{whose}batch']}"
        rows.append(shown | {"estimate (MiB)": row["estimated_MB"], "tensors as measured (MiB)": row["measured_MB"]})
    return {PAGE: [*table(rows), "", link(PAGE, PLANNED, "All plans")]}


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
    main()
