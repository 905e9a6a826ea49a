"""What a CPU loses to the kernel, which clears memory that the process gave back, and how that ended.

    python benchmarks/page_faults.py [--trainers NAME ...] [--sides 128 64]

writes ``benchmarks/results/page_faults.csv``: one patch of 128 x 128 x 128 voxels through the network that nnU-Net's
predictor gets, and one training step of two patches of 64 x 64 x 64, each in a process of its own: as torch comes, with
the huge pages of ``discovery/huge_pages.py``, with freed memory kept by ``nnunet/malloc.py`` (nnU-Net's own trainer
keeps none), and with both. Seconds are of the processor and of the clock, per patch or step, after three; memory is the
most that the process held, libraries included.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recording import RESULTS, Record, Tables, argument_parser, link, machine, read_rows, table
from under_load import FORWARD, STEP, THREADS, prepare

from nnunetv2_lightnets.costs.trainers import BASELINE
from nnunetv2_lightnets.discovery.huge_pages import VARIABLE
from nnunetv2_lightnets.nnunet.malloc import SWITCH

FAULTS = RESULTS / "page_faults.csv"
PAGE = "docs/memory.md"
SIDES = {FORWARD: 128, STEP: 64}
TRAINERS = (BASELINE, "nnUNetTrainerULite", "nnUNetTrainerUltraLightUNet", "nnUNetTrainerLightMUNetS")
SHOWN = (BASELINE, "nnUNetTrainerULite", "nnUNetTrainerLightMUNetS")
AS_TORCH_COMES, HUGE_PAGES, KEPT, BOTH = "as torch comes", "huge pages", "kept", "huge pages, kept"
WAYS = {  # and what switches it
    AS_TORCH_COMES: {SWITCH: "off", VARIABLE: "0"},
    HUGE_PAGES: {SWITCH: "off", VARIABLE: "1"},
    KEPT: {SWITCH: "", VARIABLE: "0"},
    BOTH: {SWITCH: "", VARIABLE: "1"},
}
FACTS = ("threads", "processor", "torch")


def measure(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Costs of one run, the mean of ``repeats``."""
    for _ in range(3):
        run()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(repeats):
        run()
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - start
    kernel, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {
        "seconds": f"{seconds / repeats:.2f}",
        "CPU seconds": f"{(kernel + user) / repeats:.2f}",
        "in the kernel": f"{100 * kernel / (kernel + user):.1f} %",
        "page faults": (after.ru_minflt - before.ru_minflt) // repeats,
        "peak MB": round(after.ru_maxrss * 1024 / 1e6),
    }


def tables() -> Tables:
    """Two rows for each network: as torch comes, and as our commands have it."""
    rows = read_rows(FAULTS)
    ours = {trainer: ways_of(trainer)[-1] for trainer in SHOWN}
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        name = row["trainer"], row["memory"]
        if name[1] not in (AS_TORCH_COMES, ours.get(name[0])) or name[0] not in SHOWN:
            continue
        cells = shown.setdefault(name, {"trainer": f"`{name[0]}`", "memory": name[1]})
        for column in ("seconds", "in the kernel", "peak MB"):
            cells[f"{row['step']}: {column}"] = row[column]
    about = ", ".join(f"{fact} {rows[0][fact]}" for fact in FACTS)
    return {PAGE: [f"Measured with: {about}.", "", *table(list(shown.values())), "", link(PAGE, FAULTS)]}


def ways_of(trainer: str) -> list[str]:
    """What can be measured of a trainer."""
    return [way for way in WAYS if way not in (KEPT, BOTH) or trainer != BASELINE]


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="patches or steps that are timed")
    parser.add_argument("--trainers", nargs="+", default=TRAINERS)
    parser.add_argument("--out", type=Path, default=FAULTS)
    parser.add_argument("--sides", type=int, nargs=2, default=tuple(SIDES.values()), help="voxels: of a patch, trained")
    parser.add_argument("--case", nargs=3, help="trainer, step and side, in this process; what main() calls")
    arguments = parser.parse_args()
    if arguments.case:
        trainer, step, side = arguments.case
        with contextlib.redirect_stdout(io.StringIO()):
            run = prepare(trainer, step, (int(side),) * 3)
        print(json.dumps(measure(run, arguments.repeats)))
        return
    import torch

    torch.set_num_threads(THREADS)  # for the description alone
    record = Record(arguments.out, "trainer", "step", "memory")
    for trainer in arguments.trainers:
        for step, side in zip(SIDES, arguments.sides, strict=True):
            for way in ways_of(trainer):
                words = ["--repeats", str(arguments.repeats), "--case", trainer, step, str(side)]
                environment = os.environ | WAYS[way]
                done = subprocess.run(
                    [sys.executable, __file__, *words], capture_output=True, text=True, check=True, env=environment
                )
                row = {"trainer": trainer, "step": step, "memory": way} | json.loads(done.stdout.splitlines()[-1])
                record.put(row | machine(*FACTS))


if __name__ == "__main__":
    main()
