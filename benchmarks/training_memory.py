"""The planner's estimate of training memory beside what training steps take on this CPU, for every network.

Each case runs in a process of its own. Measured is the growth of the process's resident memory, from before the trainer
is made to the peak of its training steps; steps on a small patch come before, so that libraries are loaded. The C
library's allocator is told to give back what is freed, so that the numbers are of tensors and not of its pools.

    python benchmarks/training_memory.py

The table of ``docs/planning.md`` is made of the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from pages import DOCS, markdown, read_rows, write_table

from nnunetv2_lightnets.costs.trainers import find_trainer_class
from nnunetv2_lightnets.costs.worker import Memory
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.plans import Setting, patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer
from nnunetv2_lightnets.plans.memory import training_memory

RESULTS = Path(__file__).parent / "results" / "training_memory.csv"
PAGE = DOCS / "planning.md"
SMALL = {2: 64, 3: 16}  # side of the patch that comes before, by dimensions
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # glibc's
VOLUMES = (((32, 32, 32), 2), ((40, 56, 40), 2), ((20, 96, 96), 2))
LARGE_VOLUMES = (((64, 64, 64), 2), ((20, 128, 112), 2))
IMAGES = (((192, 192), 2), ((256, 320), 2), ((384, 384), 1))
LIGHT_M = ("nnUNetTrainerLightMUNet", "nnUNetTrainerLightMUNetS", "nnUNetTrainerLightMUNetT")
CNNS = ("nnUNetTrainerULite", *(f"nnUNetTrainerUltraLightUNet{variant}" for variant in ("T", "S", "", "M", "L")))
SWIN = ("nnUNetTrainerSwinUMambaScratch", "nnUNetTrainerSwinUMambaDScratch")
CASES = [
    *((trainer, *case) for trainer in LIGHT_M for case in (*VOLUMES, ((256, 320), 2))),
    *((trainer, *case) for trainer in CNNS for case in (*LARGE_VOLUMES, ((512, 512), 4))),
    *((trainer, *case) for trainer in SWIN for case in IMAGES),
]
COLUMNS = ("trainer", "patch", "batch", "saved_MB", "estimated_MB", "measured_MB", "estimated_over_measured")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--case", nargs=3, metavar=("TRAINER", "PATCH", "BATCH"), help="this one alone, as JSON; used by itself"
    )
    args = parser.parse_args()
    if args.case:
        trainer, patch, batch = args.case
        print(json.dumps(measure(trainer, tuple(json.loads(patch)), int(batch))))
        return 0
    with open(args.out, "w", newline="", encoding="utf-8") as output:
        table = csv.DictWriter(output, COLUMNS, lineterminator="\n")
        table.writeheader()
        for trainer, patch, batch in CASES:
            command = [sys.executable, __file__, "--case", trainer, json.dumps(patch), str(batch)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
            row = json.loads(done.stdout.splitlines()[-1])
            table.writerow(row)
            output.flush()
            print(*row.values(), sep="  ")
    if args.out == RESULTS:
        write_page(RESULTS)
    return 0


def write_page(results: Path) -> None:
    """Put what is recorded on the page."""
    titles = ("trainer", "patch", "batch", "estimate (MB)", "measured (MB)", "estimate / measured")
    columns = [column for column in COLUMNS if column != "saved_MB"]
    rows = [
        {title: row[column].replace(" x ", " × ") for title, column in zip(titles, columns, strict=True)}
        for row in read_rows(results)
    ]
    write_table(PAGE, Path(__file__).name, markdown(titles, rows))


def measure(name: str, patch: tuple[int, ...], batch: int) -> dict[str, object]:
    """One row: estimate, then training steps of one channel and three classes."""
    torch.set_num_threads(1)
    trainer_class = find_trainer_class(name)
    setting = patch_setting(patch, 1, 3)
    estimate = training_memory(trainer_class, setting, batch)
    measured = measured_memory(name, setting, batch)
    megabytes = [round(n / 2**20) for n in (estimate.saved, estimate.total, measured)]
    sizes = " x ".join(map(str, setting.patch))
    return dict(zip(COLUMNS, (name, sizes, batch, *megabytes, round(estimate.total / measured, 2)), strict=True))


def measured_memory(name: str, setting: Setting, batch: int) -> int:
    """Bytes that the process grows by, at most, when the trainer is made and trains for two steps."""
    device = torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        dims = len(setting.patch)
        peak_of_steps(name, patch_setting((SMALL[dims],) * dims, 1, 3), 2, Memory(device))
        gc.collect()
        return peak_of_steps(name, setting, batch, Memory(device))


def peak_of_steps(name: str, setting: Setting, batch: int, memory: Memory) -> int:
    """Bytes at most during two training steps; the second has the optimizer's state."""
    with temporary_folders() as folder:
        trainer = make_trainer(find_trainer_class(name), setting, batch, folder, torch.device("cpu"))
    data = make_batch(trainer, setting.patch, batch)
    trainer.network.train()
    memory.start()
    for _ in range(2):
        trainer.train_step(data)
    return memory.peak()


if __name__ == "__main__":
    sys.exit(main())
