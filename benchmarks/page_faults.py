"""What prediction on a CPU loses to the kernel, which clears memory that the process gave back, and how that ended.

    python benchmarks/page_faults.py

writes ``benchmarks/results/page_faults.csv``: one patch of 128 x 128 x 128 voxels through the network that nnU-Net's
predictor gets, in a process of its own, with and without ``nnunetv2_lightnets.nnunet.malloc``. Seconds are of the
processor and of the clock, per patch, after three patches; memory is the most that the process held.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from recording import RESULTS, Record, Tables, argument_parser, link, machine, read_rows, table

from nnunetv2_lightnets.nnunet import malloc
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.trainers import find_trainer

FAULTS = RESULTS / "page_faults.csv"
PAGE = "docs/memory.md"
SIDE = 128
TRAINERS = ("nnUNetTrainerULite", "nnUNetTrainerUltraLightUNet", "nnUNetTrainerLightMUNetS")
WAYS = ("given back", "kept")
FACTS = ("threads", "processor", "torch")


def predict(trainer: str, way: str, patches: int) -> dict[str, Any]:
    """Costs of one patch, the mean of ``patches``."""
    if way == WAYS[0]:
        malloc.reuse_freed_memory = lambda: False
    setting = patch_setting((SIDE,) * 3, 1, 3)
    plans = PlansManager(setting.plans)
    found = find_trainer(trainer)
    assert found is not None
    configuration = plans.get_configuration(setting.configuration)
    network = found.build_network_architecture(plans, configuration, 1, 3, False).eval()
    patch = torch.randn(1, 1, *(SIDE,) * 3)
    with torch.inference_mode():
        for _ in range(3):
            network(patch)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(patches):
            network(patch)
        after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - start
    kernel, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {
        "seconds": f"{seconds / patches:.2f}",
        "CPU seconds": f"{(kernel + user) / patches:.2f}",
        "in the kernel": f"{100 * kernel / (kernel + user):.1f} %",
        "page faults": (after.ru_minflt - before.ru_minflt) // patches,
        "peak MB": round(after.ru_maxrss * 1024 / 1e6),
    }


def tables() -> Tables:
    """Two rows for each network."""
    rows = read_rows(FAULTS)
    shown = [{k: f"`{v}`" if k == "trainer" else v for k, v in row.items() if k not in FACTS} for row in rows]
    about = ", ".join(f"{fact} {rows[0][fact]}" for fact in FACTS)
    return {PAGE: [f"Measured with: {about}.", "", *table(shown), "", link(PAGE, FAULTS)]}


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--patches", type=int, default=5, help="that are timed")
    parser.add_argument("--case", nargs=2, help="trainer and way, in this process; what main() calls")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(predict(*arguments.case, arguments.patches)))
        return
    record = Record(FAULTS, "trainer", "freed memory")
    for trainer in TRAINERS:
        for way in WAYS:
            command = [sys.executable, __file__, "--patches", str(arguments.patches), "--case", trainer, way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"trainer": trainer, "freed memory": way} | json.loads(done.stdout.splitlines()[-1])
            record.put(row | machine(*FACTS))


if __name__ == "__main__":
    main()
