"""What all sections share: rows that are bounded in time and recorded as they come, and timers.

A kernel that reads beyond its memory leaves a CUDA device unusable for its process, and a kernel that hangs never
returns. So a section runs in a process of its own (see ``gpu.py``). A row is recorded as STARTED before it is measured.
Whatever happens to the process then costs this row alone: the next process goes on with the row after it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from recording import Record

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line

STARTED = "started"
NO_TIME = "not run: time"
RESTART = 75  # exit status of a process whose device is unusable
TOOK, NOTE = "row s", "note"  # seconds that a row took, compilation included; what went wrong
_LONGEST_NOTE = 200


@dataclass(frozen=True)
class Table:
    """A file of results: which columns name a row, and which hold what was measured."""

    file: str
    names: tuple[str, ...]
    values: tuple[str, ...]


class Rows:
    """The rows of a section, measured one by one until its time is over.

    Args:
        table: their file and columns.
        folder: where the file is. Rows that it holds are kept, but for those that time did not allow.
        until: ``time.time()`` at the section's end.
    """

    def __init__(self, table: Table, folder: Path, until: float) -> None:
        self.table, self.until = table, until
        self.record = Record(folder / table.file, *table.names)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def put(self, names: Sequence[Any], **values: Any) -> None:
        """Record a row; columns without a value stay empty."""
        empty = dict.fromkeys((*self.table.values, TOOK, NOTE))
        self.record.put(dict(zip(self.table.names, names, strict=True)) | empty | values)

    def measure(self, names: Sequence[Any], compute: Callable[[], Mapping[str, Any]], seconds: float) -> None:
        """Measure a row, unless it is there already or would take too long; what goes wrong becomes its note.

        Args:
            names: of the row.
            compute: returns its values.
            seconds: that it is expected to take at most.
        """
        if names in self.record and self.note_of(names) != NO_TIME:
            return
        if self.left < seconds:
            return self.put(names, note=NO_TIME)
        self.put(names, note=STARTED)
        start = time.monotonic()
        try:
            values = compute()
        except torch.OutOfMemoryError:
            values = {NOTE: "out of memory"}
        except LightNetsError as error:
            values = {NOTE: str(error)[:_LONGEST_NOTE]}
        except Exception as error:  # of any library: a row must not end the section
            values = {NOTE: f"{type(error).__name__}: {last_line(error)}"[:_LONGEST_NOTE]}
        self.put(names, **values, **{TOOK: f"{time.monotonic() - start:.1f}"})
        if not usable():
            sys.exit(RESTART)

    def note_of(self, names: Sequence[Any]) -> str:
        """The note of a recorded row."""
        wanted = list(map(str, names))
        found = (row for row in self.record.rows if [row[name] for name in self.table.names] == wanted)
        return next(found)[NOTE]

    def close(self, reason: str) -> bool:
        """The process that measured is dead: say so in the row that it was at. Whether there was one."""
        open_rows = [row for row in self.record.rows if row[NOTE] == STARTED]
        self.record.put(*(row | {NOTE: reason} for row in open_rows))
        return bool(open_rows)


@dataclass(frozen=True)
class Bench:
    """A section at work."""

    rows: Rows
    device: torch.device
    toy: bool  # a dry run: smallest sizes, few repetitions
    arguments: Namespace  # of the command line

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.rows.record.file.parent


def usable() -> bool:
    """Whether the CUDA device, if there is one, still answers; give its memory back."""
    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


# ---- Time ----


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and the seconds of the first one, which compiles."""

    median: float
    first: float
    rounds: int


def timed(call: Callable[[], object], device: torch.device, rounds: int, most_seconds: float = 2.0) -> Timing:
    """Time calls after two that are not counted, by events on the device, or by the clock on a CPU.

    Args:
        call: what to time.
        device: where it computes.
        rounds: that are timed: fewer where they would take longer than ``most_seconds``, but one.
        most_seconds: for all rounds. A first call on a CPU that takes much longer is the only one.
    """

    def once() -> float:
        start = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - start

    first = once()
    if device.type == "cpu" and first > 3 * most_seconds:
        return Timing(first, first, 1)
    warm = once()
    rounds = max(1, min(rounds, int(most_seconds / warm)))
    if device.type != "cuda":
        return Timing(statistics.median(once() for _ in range(rounds)), first, rounds)
    # Nothing waits between the rounds, so that the device does not wait for Python where it is the slower one.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    wait(device)
    return Timing(statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3, first, rounds)


def wait(device: torch.device) -> None:
    """Until all that is queued is computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call that replays a CUDA graph of ``call``; on a CPU, ``call`` itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is compiled, tuned or allocated at first use must be so before the capture
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def start_memory(device: torch.device) -> None:
    """Forget earlier peaks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Largest MB that torch held since :func:`start_memory`; unknown on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else None


def copy_bandwidth(device: torch.device, toy: bool) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB on the device (1 MiB in a dry run)."""
    source = torch.ones(2**18 if toy else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, 20).median
