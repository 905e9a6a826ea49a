"""Threads that wait for each other sleep after a fraction of a millisecond, so that other processes get on.

torch computes every operation with all its threads, and the OpenMP runtime lets a thread that is ready first wait in a
loop for the others: for milliseconds with GNU's libgomp, for 200 ms with LLVM's and Intel's. Where another process has
the processor that the others need, as nnU-Net's own workers have, each of thousands of operations waits so, and the
loop takes the time that the others wait for. How long it lasts is read once, when the runtime is loaded with torch.

Imports nothing: the start-up file asks for it.
"""

import os
import sys

SWITCH = "NNUNET_LIGHTNETS_WAITING"
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # with any of them the user has decided
# Turns of libgomp's loop, some 10 to 60 ns each, and milliseconds for LLVM's and Intel's, whose least is 1. With none,
# every operation would begin and end in the kernel. benchmarks/under_load.py --spins compares others.
SETTINGS = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}


def shorten_waiting() -> None:
    """Set it for this process and those that it starts, before torch is loaded; on Linux, where it was measured."""
    wanted = os.environ.get(SWITCH, "").strip().lower() not in ("off", "0", "false", "no")
    if wanted and sys.platform == "linux" and not any(name in os.environ for name in VARIABLES):
        os.environ.update(SETTINGS)


def waiting() -> str:
    """What this process has set, in words."""
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return ", ".join(found) if found else "milliseconds: as the OpenMP runtime comes"
