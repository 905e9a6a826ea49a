"""CPU time and memory of every trainer's network beside nnU-Net's own, with ``nnUNetv2_lightnets benchmark``.

    python benchmarks/trainers_cpu.py --folder WORK [--threads 2] [--seconds 3] [--patches 64×64×64 256×256 ...]

Runs the command for two patches in 3D and two in 2D, each network in a process of its own, and goes on where it was
when started again. Writes ``benchmarks/results/trainers_cpu.csv``. Times on a shared machine differ from minute to
minute: what can be compared are the ratios, and of those only the large ones. Every page that shows a trainer's time or
memory on a CPU has them from :func:`cells`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from network_costs import FAMILIES, LIGHT_M, ULTRA_LIGHT
from recording import MACHINE, RESULTS, Record, Tables, argument_parser, link, read_rows, table

from nnunetv2_lightnets.costs.trainers import BASELINE

MEASURED = RESULTS / "trainers_cpu.csv"
PATCHES = {"×".join(map(str, patch)): patch for patch in ((64,) * 3, (256,) * 2, (96,) * 3, (512,) * 2)}
VOLUME, IMAGE, LARGE_VOLUME, LARGE_IMAGE = PATCHES
CLASSES = 3
TITLES = {  # of a column, by the recorded one
    "inference_s": "CPU time of a patch, {}",
    "training_s": "CPU time of a training step, {}",
    "inference_MB": "memory for a patch (MB), {}",
    "training_MB": "memory of a training step (MB), {}",
}
PAGES: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # trainers, patches
    "docs/benchmark.md": (FAMILIES, (VOLUME, LARGE_VOLUME, IMAGE, LARGE_IMAGE)),
    "docs/lightm_unet.md": ((BASELINE, *LIGHT_M), (VOLUME, IMAGE)),
    "docs/swin_umamba.md": ((BASELINE, "nnUNetTrainerSwinUMamba", "nnUNetTrainerSwinUMambaD"), (IMAGE,)),
    "docs/ultralight_unet.md": ((BASELINE, "nnUNetTrainerULite", *ULTRA_LIGHT), (VOLUME, IMAGE)),
}


def measure(patch: Sequence[int], folder: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Run the command for one patch; its rows."""
    sizes = [str(size) for size in patch]
    words = ("--patch", *sizes, "--classes", str(CLASSES), "--no-volume", "-device", "cpu")
    more = ("--threads", str(threads), "--seconds", str(seconds), "-o", str(folder))
    command = Path(sys.executable).with_name("nnUNetv2_lightnets")
    subprocess.run([str(command), "benchmark", *words, *more], check=True)
    benchmark = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for measured in benchmark["rows"]:
        row: dict[str, Any] = {"patch": "×".join(sizes), "trainer": measured["trainer"]}
        row |= dict.fromkeys((*TITLES, "batch")) | {key: benchmark["machine"][key] for key in MACHINE}
        if "error" not in measured:
            for what in ("inference", "training"):
                row[f"{what}_s"] = f"{measured[what]['median']:.4f}"
                row[f"{what}_MB"] = round(measured[what]["memory"] / 1e6)
            row["batch"] = measured["training"]["batch_size"]
        rows.append(row | {"error": measured.get("error", "")})
    return rows


@cache
def measured() -> dict[tuple[str, str], dict[str, str]]:
    """Rows as recorded, by trainer and patch."""
    return {(row["trainer"], row["patch"]): row for row in read_rows(MEASURED)}


def cells(trainer: str, patch: str, columns: Sequence[str] = tuple(TITLES)) -> dict[str, str]:
    """Cells of a trainer's row, by their column's title: times as multiples of nnU-Net's own network's, and MB.

    A network that does not exist for a patch, or was not measured, has empty cells.
    """
    row, base = measured().get((trainer, patch), {}), measured()[BASELINE, patch]
    found = {}
    for column in columns:
        value = row.get(column)
        if value and column.endswith("_s"):
            value = f"{float(value) / float(base[column]):.2f}×"
        found[TITLES[column].format(patch)] = f"{int(value):,}" if value and column.endswith("_MB") else value or ""
    return found


def machine_of(patch: str) -> str:
    """What the times of a patch were measured on."""
    row = measured()[BASELINE, patch]
    about = f"{row['processor']}, {row['threads']} threads, torch {row['torch']}"
    return f"{about}; a training step has {row['batch']} patches"


def tables() -> Tables:
    """Of all pages that show time or memory on a CPU, a table for each patch."""
    found: Tables = {}
    for page, (trainers, patches) in PAGES.items():
        lines = [f"Times are multiples of nnU-Net's own network's. {machine_of(patches[0])}.", ""]
        for patch in patches:
            there = [trainer for trainer in trainers if (trainer, patch) in measured()]
            if not there:
                continue
            lines += [*table([{"trainer": f"`{trainer}`"} | cells(trainer, patch) for trainer in there]), ""]
        found[page] = [*lines, link(page, MEASURED, "All trainers")]
    return found


def main() -> None:
    """Measure what is not measured yet."""
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the benchmark's own reports go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement's repetitions")
    parser.add_argument("--patches", nargs="+", default=list(PATCHES), choices=list(PATCHES), help="these alone")
    args = parser.parse_args()
    record = Record(MEASURED, "patch", "trainer")
    for name in args.patches:
        record.put(*measure(PATCHES[name], args.folder / name, args.threads, args.seconds))


if __name__ == "__main__":
    main()
