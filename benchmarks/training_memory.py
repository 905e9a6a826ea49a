"""The planner's estimate of training memory beside what training steps take on this CPU, for every network.

Each case runs in a process of its own. Measured is the growth of the process's resident memory, from before the trainer
is made to the peak of its training steps; steps on a small patch come before, so that libraries are loaded. The C
library's allocator is told to give back what is freed, so that the numbers are of tensors and not of its pools.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from network_costs import LIGHT_M, ULTRA_LIGHT
from recording import MOST_ROWS, RESULTS, Record, Tables, argument_parser, link, read_rows, table

from nnunetv2_lightnets.costs.memory import Memory
from nnunetv2_lightnets.costs.trainers import BASELINE, find_trainer_class
from nnunetv2_lightnets.nnunet.available import available_main_memory
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.malloc import SWITCH
from nnunetv2_lightnets.nnunet.memory import training_memory
from nnunetv2_lightnets.nnunet.plans import Setting, patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer

MEASURED = RESULTS / "training_memory.csv"
PAGE = "docs/planning.md"
SMALL = {2: 64, 3: 16}  # side of the patch that comes before, by dimensions
ALLOCATOR = {  # glibc's settings, and that ours leave them as they are
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    SWITCH: "off",
}
VOLUMES = (((32, 32, 32), 2), ((40, 56, 40), 2), ((20, 96, 96), 2))
LARGE_VOLUMES = (((64, 64, 64), 2), ((20, 128, 112), 2))
LARGEST_VOLUMES = (((96, 96, 96), 2), ((128, 128, 128), 2))  # nnU-Net's usual ones; where the machine has the memory
IMAGES = (((192, 192), 2), ((256, 320), 2), ((384, 384), 1))
CNNS = ("nnUNetTrainerULite", *ULTRA_LIGHT)
SWIN = ("nnUNetTrainerSwinUMambaScratch", "nnUNetTrainerSwinUMambaDScratch")
CASES = [
    *((trainer, *case) for trainer in LIGHT_M for case in (*VOLUMES, ((256, 320), 2))),
    *((trainer, *case) for trainer in CNNS for case in (*LARGE_VOLUMES, ((512, 512), 4))),
    *((trainer, *case) for trainer in SWIN for case in IMAGES),
    *((trainer, *case) for case in LARGEST_VOLUMES for trainer in (BASELINE, *LIGHT_M, *CNNS)),
    *((BASELINE, *case) for case in LARGE_VOLUMES),
]
COLUMNS = ("trainer", "patch", "batch", "saved_MB", "estimated_MB", "measured_MB", "estimated_over_measured")


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--trainers", nargs="+", help="these alone")
    parser.add_argument(
        "--case", nargs=3, metavar=("TRAINER", "PATCH", "BATCH"), help="this one alone, as JSON; used by itself"
    )
    args = parser.parse_args()
    if args.case:
        trainer, patch, batch = args.case
        print(json.dumps(measure(trainer, tuple(json.loads(patch)), int(batch))))
        return
    record = Record(args.out, "trainer", "patch", "batch")
    for trainer, patch, batch in CASES:
        if args.trainers and trainer not in args.trainers:
            continue
        row = in_own_process(__file__, "--case", trainer, json.dumps(patch), str(batch))
        if row:
            record.put(row)
        else:
            print(f"{trainer}, {patch}: this machine has too little memory", file=sys.stderr)


def in_own_process(script: str, *words: str) -> dict[str, object]:
    """The row that a script prints, run with the allocator's settings."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def tables() -> Tables:
    """The trainers' worst cases, the worst first."""
    recorded = read_rows(MEASURED)
    ratios = [float(row["estimated_over_measured"]) for row in recorded]
    worst: dict[str, dict[str, str]] = {}
    for row in sorted(recorded, key=lambda row: -abs(float(row["estimated_over_measured"]) - 1)):
        shown = {"trainer": f"`{row['trainer']}`", "patch": row["patch"].replace(" x ", "×"), "batch": row["batch"]}
        shown |= {"estimate (MiB)": row["estimated_MB"], "tensors as measured (MiB)": row["measured_MB"]}
        worst.setdefault(row["trainer"], shown | {"estimate / measured": row["estimated_over_measured"]})
    title = f"In {len(recorded)} cases the estimate is {min(ratios)} to {max(ratios)} of what was measured. The worst:"
    return {PAGE: [title, "", *table(list(worst.values())[:MOST_ROWS]), "", link(PAGE, MEASURED, "All cases")]}


def measure(name: str, patch: tuple[int, ...], batch: int) -> dict[str, object]:
    """One row: estimate, then training steps of one channel and three classes; none where they do not fit."""
    torch.set_num_threads(1)
    trainer_class = find_trainer_class(name)
    setting = patch_setting(patch, 1, 3)
    estimate = training_memory(trainer_class, setting, batch)
    available = available_main_memory()
    if available is not None and 1.1 * estimate.total > available:
        return {}
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
    main()
