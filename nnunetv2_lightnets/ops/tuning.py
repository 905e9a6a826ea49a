"""Choices that only a measurement can make: the tiles of a kernel, or which of two backends comes first on this card.

A choice has a few candidates, of which the first is the one to take where nothing can be measured. When it is first
needed for a GPU, all are timed there with the very arguments of the call, and the fastest is kept: in memory, and on
disk with all times, in ``tuning.json`` in the cache folder (``NNUNET_LIGHTNETS_CACHE``), under the card and the
versions that the times depend on. The next process reads it there. ``NNUNET_LIGHTNETS_TUNING=off`` takes the
first candidate always: then equal calls give equal bits on every machine with this kind of card.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Hashable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.files import cache_folder, write_atomically
from nnunetv2_lightnets.ops.tensors import in_one_line

ENVIRONMENT_VARIABLE = "NNUNET_LIGHTNETS_TUNING"
FILE = "tuning.json"
ROUNDS = 5  # timed calls of each candidate, taken in turns; the median counts

Candidate = TypeVar("Candidate")
_logger = logging.getLogger("nnunetv2_lightnets")
_chosen: dict[tuple[Any, ...], str] = {}


def choose(
    name: str,
    key: tuple[Hashable, ...],
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
    device: torch.device,
) -> Candidate:
    """The fastest candidate on this GPU; the first where that cannot be measured.

    Args:
        name: Of the choice, such as a kernel's.
        key: What it depends on beside the GPU, such as dtype and sizes.
        candidates: They are told apart, in memory and on disk, by ``str``.
        run: Does the work with a candidate; called several times with each where they are measured.
        device: Where the work is done.
    """
    if len(candidates) == 1 or device.type != "cuda" or os.environ.get(ENVIRONMENT_VARIABLE) == "off":
        return candidates[0]
    by_name = {str(candidate): candidate for candidate in candidates}
    entry = (name, *key, torch.cuda.current_device() if device.index is None else device.index)
    found = _chosen.get(entry)
    if found in by_name:
        return by_name[found]
    title = f"{name}: {', '.join(map(str, key))}"
    found = str(_read().get(_place(device), {}).get(title, {}).get("chosen"))
    if found not in by_name:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed while a graph is recorded
            return candidates[0]
        with torch.cuda.device(device):
            times = _measure(candidates, run)
        found = min(times, key=times.__getitem__, default=str(candidates[0]))
        if len(times) > 1:  # else something failed, which may be otherwise in the next process: too little memory, say
            _logger.info("measured on this GPU, in ms: %s: %s; from now on %s", title, times, found)
            _write(_place(device), title, {"chosen": found, "milliseconds": times})
    _chosen[entry] = found
    return by_name[found]


def _measure(candidates: Sequence[Candidate], run: Callable[[Candidate], object]) -> dict[str, float]:
    """Median milliseconds of each candidate that can do the work, measured in turns."""
    working = [candidate for candidate in candidates if _works(candidate, run)]
    times: dict[str, list[float]] = {str(candidate): [] for candidate in working}
    try:
        for _ in range(ROUNDS):
            for candidate in working:
                times[str(candidate)].append(_milliseconds(candidate, run))
    except Exception as error:  # the call itself comes after this, and says so if it cannot be made
        _logger.info("not measured on this GPU (%s)", in_one_line(error))
        return {}
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def _works(candidate: Candidate, run: Callable[[Candidate], object]) -> bool:
    """Call once, which compiles and fills caches."""
    try:
        _milliseconds(candidate, run)
    except Exception as error:  # compilers and drivers raise what they like, and the other candidates may do
        _logger.info("not taken on this GPU: %s (%s)", candidate, in_one_line(error))
        return False
    return True


def _milliseconds(candidate: Candidate, run: Callable[[Candidate], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run(candidate)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _place(device: torch.device) -> str:
    """The card, and the versions that times depend on."""
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}, "
        f"Triton {_version_of('triton')}, nnunetv2_lightnets {__version__}"
    )


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _file() -> Path | None:
    try:
        return cache_folder() / FILE
    except ImportError:  # pooch, which finds the folder
        return None


def _read() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured before, on all cards; nothing where the file is missing or damaged."""
    file = _file()
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {
            place: {title: entry for title, entry in entries.items() if isinstance(entry, dict)}
            for place, entries in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(place: str, title: str, entry: dict[str, Any]) -> None:
    """Add an entry to the file, which other processes write to, too; without it the next process measures again."""
    file = _file()
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=10):
            content = _read()
            content.setdefault(place, {})[title] = entry
            write_atomically(file, json.dumps(content, indent=1) + "\n")
    except (OSError, Timeout) as error:
        _logger.info("what was measured on this GPU could not be recorded in %s (%s)", file, in_one_line(error))
