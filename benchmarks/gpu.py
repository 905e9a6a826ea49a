"""What nnunetv2_lightnets does on a GPU: is it right, is it fast, what do networks cost, do they learn?

    python benchmarks/gpu.py [--only a,c] [--minutes 2] [--continue] [--out FOLDER]
                             [--preprocessed FOLDER | --raw FOLDER] [--train-minutes 5]
    python benchmarks/gpu.py --dry-run

Sections, each in a process of its own, which ends after ``--minutes``:

    a  values: every operator, backend and dtype, every network, compiled, in CUDA graphs
    b  speed of scan, convolution and norm beside other backends and the copy bandwidth
    c  networks: training step and forward pass beside nnU-Net's own network
    d  trainings through nnU-Net for equal minutes

Rows are recorded as they are measured, in ``benchmarks/results/gpu/<card>/`` or ``--out``: a CSV file for each section,
``machine.json``, what was chosen by measurement (``tuning.json``), and a page, ``README.md``. A row that time does not
allow says so; ``--continue`` keeps what is there and measures those. It needs PyTorch, Triton, NumPy and SciPy; c and d
say where nnU-Net is missing (docs/gpu.md).

``--dry-run`` runs all sections on a CPU at toy size, Triton's kernels in its interpreter, into a temporary folder: no
figure of it means anything. Exit status: 0; 1 if a value is wrong or a section broke off; 2 without a CUDA device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_sections  # noqa: F401 # first: it makes the checkout importable
import torch
from gpu_sections import page
from gpu_sections.bench import RESTART, Bench, Rows, copy_bandwidth
from recording import RESULTS, Tables, argument_parser, read_rows

from nnunetv2_lightnets.costs.machine import machine
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import CACHE_VARIABLE, last_line, write_atomically
from nnunetv2_lightnets.ops import tuning

SECTIONS = {"a": "values", "b": "speed", "c": "networks", "d": "training"}
RECORDED = RESULTS / "gpu"
DOCS = "docs/gpu.md"
VALUES = f"{SECTIONS['a']}.csv"
DESCRIBE = "machine"  # a section without rows, before all others
DRY_MINUTES = 5.0
PREPROCESSING = 3.0  # minutes more for d, where the data are raw
GRACE = 10  # seconds after its end, in which a section may finish its row
PACKAGES = ("triton", "mamba_ssm", "causal_conv1d", "kernels", "nnunetv2", "monai", "numpy", "scipy")


# ---- In the process of a section ----


def work(section: str, folder: Path, arguments: Namespace) -> None:
    """Measure one section."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if section == DESCRIBE:
        text = json.dumps(describe(device, arguments.dry_run), indent=1, ensure_ascii=False)
        return write_atomically(folder / page.MACHINE, text + "\n")
    module = importlib.import_module(f"gpu_sections.{SECTIONS[section]}")
    module.run(Bench(Rows(module.TABLE, folder, arguments.until), device, arguments.dry_run, arguments))


def describe(device: torch.device, toy: bool) -> dict[str, Any]:
    """The machine, and what of our needs is installed."""
    from nnunetv2_lightnets.ops import available_backends

    start = time.monotonic()
    backends = available_backends()
    seconds = time.monotonic() - start
    known: dict[str, Any] = {"card": "none", "driver": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = {
            "card": properties.name,
            "driver": driver(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory, GB": round(properties.total_memory / 1e9, 1),
            "L2 cache, MB": round(properties.L2_cache_size / 1e6, 1),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    known |= {
        key: value for key, value in machine(torch.device("cpu")).items() if key not in ("device", "scan backends")
    }
    installed = {name: version(name) for name in PACKAGES}
    return known | {
        "Triton": installed.pop("triton"),
        "packages": installed,
        "scan backends": {name: reason or "runs" for name, reason in backends.items()},
        "seconds to try the backends": round(seconds, 2),
        "copy bandwidth, GB/s": round(copy_bandwidth(device, toy) / 1e9),
        "date": date.today().isoformat(),
        "dry run": toy,
    }


def driver() -> str | None:
    """Version of NVIDIA's driver; None where nvidia-smi does not say."""
    words = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- In the process that was started ----


def run_section(section: str, folder: Path, arguments: Namespace) -> bool:
    """Run a section to its end, in a new process wherever one dies; whether it ended by itself."""
    minutes = arguments.minutes or (DRY_MINUTES if arguments.dry_run else 2.0)
    if section == "d":
        minutes = max(minutes, 4 * (arguments.train_minutes + 0.5)) + (PREPROCESSING if arguments.raw else 0)
    table = None if section == DESCRIBE else importlib.import_module(f"gpu_sections.{SECTIONS[section]}").TABLE
    until = time.time() + 60 * minutes
    if table and not arguments.keep:
        (folder / table.file).unlink(missing_ok=True)
    while True:
        status = run_process(section, folder, until, arguments.dry_run)
        if status == 0 or table is None:
            return status == 0
        rows = Rows(table, folder, until)
        died = "it took too long" if status is None else f"its process died, exit status {status}"
        if not rows.close(died) and status != RESTART:
            print(f"gpu.py: section {section} broke off: {died}", file=sys.stderr)
            return False
        if status is None:
            return True


def run_process(section: str, folder: Path, until: float, dry_run: bool) -> int | None:
    """The exit status of a section's process; None if it was stopped as its time was over."""
    words = [sys.executable, __file__, *sys.argv[1:], "--out", str(folder), "--section", section, "--until", str(until)]
    environment = dict(os.environ)
    if dry_run:
        interpreted = str(int(section in ("a", "b")))
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": interpreted}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        return process.wait(max(0.0, until - time.time()) + GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # nnU-Net's data loaders, too
            process.wait()


def slug(card: str) -> str:
    """A card's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", card).strip("-")


def tables() -> Tables:
    """Of docs/gpu.md: the latest card, and links to all."""
    cards = [folder for folder in RECORDED.glob("*") if (folder / page.MACHINE).is_file()]
    if not cards:
        return {DOCS: ["Not measured on a GPU yet."]}
    cards.sort(key=lambda folder: (page.about(folder)["date"], folder.name))
    links = [f"[{page.about(folder)['card']}](../benchmarks/results/gpu/{folder.name}/{page.PAGE})" for folder in cards]
    return {DOCS: [*page.summary(cards[-1]), f"All that is recorded: {', '.join(links)}."]}


def parsed(words: list[str] | None = None) -> Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, such as a,c (default: all)")
    parser.add_argument("--minutes", type=float, help="of each section (default: 2)")
    parser.add_argument("--continue", dest="keep", action="store_true", help="keep recorded rows, measure the others")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--preprocessed", type=Path, help="nnU-Net's folder of this name, with one data set, for d")
    parser.add_argument("--raw", type=Path, help="nnU-Net's folder of raw data, with one data set, for d")
    parser.add_argument("--train-minutes", type=float, default=0.0, help="of each training (default: they share d's)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--section", help="(for its own use)")
    parser.add_argument("--until", type=float, help="(for its own use)")
    arguments = parser.parse_args(words)
    arguments.only = arguments.only.split(",")
    unknown = [name for name in arguments.only if name not in SECTIONS]
    if unknown:
        parser.error(f"--only names {', '.join(unknown)}; sections are {', '.join(SECTIONS)}")
    return arguments


def check(arguments: Namespace) -> None:
    """Refuse what cannot work before anything is measured.

    Raises:
        LightNetsError: A folder of data that holds none, or times that are not positive.
    """
    from gpu_sections.training import one_dataset

    for folder in (arguments.preprocessed, arguments.raw):
        if folder is not None:
            one_dataset(folder)
    if (arguments.minutes or 1) <= 0 or arguments.train_minutes < 0:
        raise LightNetsError("--minutes and --train-minutes must be positive numbers")


def measure(section: str, folder: Path, arguments: Namespace) -> bool:
    """Run a section and write the page anew; whether the section ended by itself."""
    print(f"==== {section}: {SECTIONS.get(section, 'what there is')} ====", flush=True)
    start = time.monotonic()
    ended = run_section(section, folder, arguments)
    write_atomically(folder / page.PAGE, "\n".join([*page.page(folder), ""]))
    print(f"==== {section}: {time.monotonic() - start:.0f} s ====", flush=True)
    return ended


@contextmanager
def kept_choices(folder: Path) -> Iterator[None]:
    """Tiles and backends are chosen anew by measurement, unless the choice is among the results; it is kept there."""
    with tempfile.TemporaryDirectory(prefix="lightnets_gpu_") as cache:
        recorded, used = folder / tuning.FILE, Path(cache, tuning.FILE)
        if recorded.is_file():
            shutil.copy(recorded, used)
        with mock.patch.dict(os.environ, {CACHE_VARIABLE: cache}):
            try:
                yield
            finally:
                if used.is_file():
                    shutil.copy(used, recorded)


def main() -> int:
    """Run the sections."""
    arguments = parsed()
    if arguments.section:
        work(arguments.section, arguments.out, arguments)
        return 0
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu.py: nothing to measure: torch sees no CUDA device; --dry-run needs none", file=sys.stderr)
        return 2
    try:
        check(arguments)
        folder = folder_of(arguments)
    except (LightNetsError, OSError) as error:
        print(f"gpu.py: {last_line(error)}", file=sys.stderr)
        return 2
    with kept_choices(folder):
        whole = all([measure(section, folder, arguments) for section in (DESCRIBE, *arguments.only)])
    print(f"page: {folder / page.PAGE}")
    wrong = [row for row in read_rows(folder / VALUES) if row["ok"] == "no"]
    for row in wrong:
        print("wrong:", *row.values())
    return 0 if whole and not wrong else 1


def folder_of(arguments: Namespace) -> Path:
    """The folder of the results, which exists then."""
    card = "dry-run" if arguments.dry_run else slug(torch.cuda.get_device_name(0))
    folder = arguments.out or (
        Path(tempfile.mkdtemp(prefix="lightnets_gpu_")) if arguments.dry_run else RECORDED / card
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("gpu.py: stopped; what was measured is recorded, and --continue goes on from there")
