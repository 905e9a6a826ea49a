"""CPU time and memory of every trainer's network beside nnU-Net's own, with ``nnUNetv2_lightnets benchmark``.

    python benchmarks/trainers_cpu.py --folder WORK [--threads 2] [--seconds 3]

Runs the command for one patch in 3D and one in 2D, each network in a process of its own, and goes on where it was when
started again. Writes ``benchmarks/results/trainers_cpu.csv`` and the table of ``docs/benchmark.md``. Times on a shared
machine differ from minute to minute: what can be compared are the ratios, and of those only the large ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import DOCS, markdown, read_rows, write_table

from nnunetv2_lightnets.costs.trainers import BASELINE

RESULTS = Path(__file__).parent / "results" / "trainers_cpu.csv"
PAGE = DOCS / "benchmark.md"
PATCHES = {"3D": (64, 64, 64), "2D": (256, 256)}
CLASSES = 3
MACHINE = ("processor", "cores", "threads", "torch")
COLUMNS = (
    "patch",
    "trainer",
    "inference_s",
    "inference_MB",
    "training_s",
    "training_MB",
    "batch",
    *MACHINE,
    "error",
)


def measure(patch: Sequence[int], folder: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Run the command for one patch; its rows."""
    sizes = [str(size) for size in patch]
    words = ("--patch", *sizes, "--classes", str(CLASSES), "--no-volume", "-device", "cpu")
    more = ("--threads", str(threads), "--seconds", str(seconds), "-o", str(folder))
    command = Path(sys.executable).with_name("nnUNetv2_lightnets")
    subprocess.run([str(command), "benchmark", *words, *more], check=True)
    benchmark = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    machine = {key: benchmark["machine"][key] for key in MACHINE}
    rows: list[dict[str, Any]] = []
    for measured in benchmark["rows"]:
        row: dict[str, Any] = {"patch": "×".join(sizes), "trainer": measured["trainer"], **machine}
        if "error" in measured:
            row["error"] = measured["error"]
        else:
            for what in ("inference", "training"):
                row[f"{what}_s"] = f"{measured[what]['median']:.4f}"
                row[f"{what}_MB"] = round(measured[what]["memory"] / 1e6)
            row["batch"] = measured["training"]["batch_size"]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """For each trainer: times as multiples of nnU-Net's, memory in MB; a block of columns for each patch."""
    lines: dict[str, dict[str, str]] = {}
    for patch in dict.fromkeys(row["patch"] for row in rows):
        here = [row for row in rows if row["patch"] == patch]
        base = next(row for row in here if row["trainer"] == BASELINE)
        for row in here:
            line = lines.setdefault(row["trainer"], {"trainer": row["trainer"]})
            for what in ("inference", "training"):
                if row["error"]:
                    line[f"{patch}, {what}"] = row["error"]
                    continue
                ratio = float(row[f"{what}_s"]) / float(base[f"{what}_s"])
                line[f"{patch}, {what}"] = f"{ratio:.2f}× / {int(row[f'{what}_MB']):,}"
    columns = list(dict.fromkeys(key for line in lines.values() for key in line))
    return markdown(columns, lines.values())


def write_page(results: Path) -> None:
    """Put what is recorded on the page."""
    rows = read_rows(results)
    one = rows[0]
    title = f"{one['processor']}, {one['threads']} threads, torch {one['torch']}; training with batch {one['batch']}:"
    write_table(PAGE, Path(__file__).name, [title, "", *table(rows)])


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the benchmark's own reports go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement's repetitions")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, patch in PATCHES.items():
        rows += measure(patch, args.folder / name, args.threads, args.seconds)
        with RESULTS.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write_page(RESULTS)


if __name__ == "__main__":
    main()
