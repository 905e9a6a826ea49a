"""``nnUNetv2_lightnets doctor``: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.discovery.environment import DISABLE, SHIM_FOLDER, VARIABLE, external_folders
from nnunetv2_lightnets.discovery.huge_pages import huge_pages
from nnunetv2_lightnets.discovery.waiting import waiting
from nnunetv2_lightnets.files import last_line
from nnunetv2_lightnets.nnunet.folders import FOLDERS

TRAINER = "nnUNetTrainerLightMUNetT_1epochs"
_NNUNET = "2.8"  # the minor release whose trainer contract we follow
# These run in processes of their own: they must see what nnUNetv2_train would see, and may die.
_SEARCH = f"""
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
print("FOUND", find({TRAINER!r}).__name__)
"""
_CONTRACT = """
import json
from nnunetv2_lightnets.nnunet.contract import faults
print("CONTRACT", json.dumps(faults()))
"""


@dataclass
class Finding:
    """One line of the report."""

    what: str  # was looked at
    value: str  # what was found
    remedy: str | None = None  # what to do if it is not all right
    fatal: bool = False  # it stops the main job
    absent: bool = False  # it is not there, and need not be

    def __str__(self) -> str:
        mark = "FAIL" if self.fatal else "note" if self.remedy is not None else "--" if self.absent else "ok"
        line = f"[{mark:^4}] {self.what:<28}{self.value}"
        return line if self.remedy is None else f"{line}\n{'':7}-> {self.remedy}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(_args: argparse.Namespace) -> int:
    """Print the report; exit code 1 if something stops the main job."""
    findings: list[Finding] = []
    looks = [versions, start_up, folders]
    if importlib.util.find_spec("torch") is not None:
        looks += [torchvision_pair, trainer_search, device, scan_backends]
    for finding in (finding for look in looks for finding in look()):
        print(finding, flush=True)
        findings.append(finding)
    if any(finding.fatal for finding in findings):
        print("\nNot ready: see FAIL above.")
        return 1
    unset = [finding.what for finding in findings if finding.what in FOLDERS and finding.remedy is not None]
    ready = f"Ready once {', '.join(unset)} {'is' if len(unset) == 1 else 'are'} set to folders" if unset else "Ready"
    print(f"\n{ready}: nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerLightMUNet")
    return 0


def versions() -> Iterator[Finding]:
    """Versions of what we stand on."""
    yield Finding("nnunetv2_lightnets", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("nnunetv2", "torch"):
        if importlib.util.find_spec(package) is None:
            yield Finding(package, "not installed", f"pip install {package}", fatal=True)
            continue
        version = importlib.metadata.version(package)
        if package == "nnunetv2" and version.split(".")[:2] != _NNUNET.split("."):
            value = f"{version}, not {_NNUNET}: {_what_another_release_lacks()}"
            yield Finding(package, value, f"pip install 'nnunetv2~={_NNUNET}.0'", fatal=True)
        else:
            yield Finding(package, version)


def _what_another_release_lacks() -> str:
    process = _python(_CONTRACT)
    said = [line for line in process.stdout.splitlines() if line.startswith("CONTRACT ")]
    if not said:
        return f"it cannot be used: {last_line(process.stderr)}"
    faults = json.loads(said[-1].removeprefix("CONTRACT "))
    if not faults:
        return "all that is used of it is there, but nobody has tested this release with our trainers"
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return f"our trainers would not work: {', '.join(faults[:3])}{more}"


def start_up() -> Iterator[Finding]:
    """Whether the start-up file ran when this Python started."""
    if SHIM_FOLDER in external_folders():
        yield Finding("start-up file", f"names our folder in {VARIABLE}")
    elif os.environ.get(DISABLE):
        yield Finding("start-up file", f"switched off by {DISABLE}", f"unset {DISABLE}", fatal=True)
    else:
        remedy = "install it again by pip, from where you have it (--force-reinstall --no-deps), or export"
        value = "did not run (python -S, or not installed by pip)"
        yield Finding("start-up file", value, f"{remedy} {VARIABLE}={SHIM_FOLDER}", fatal=True)


def folders() -> Iterator[Finding]:
    """The user's own trainer folders, and nnU-Net's three data folders."""
    for folder in external_folders():
        if folder != SHIM_FOLDER and not os.path.isdir(folder):
            yield Finding(VARIABLE, f"{folder} does not exist", f"correct or unset {VARIABLE}; nnU-Net skips it")
    for name in FOLDERS:
        value = os.environ.get(name)
        if value is None:
            yield Finding(name, "not set", f"export {name}=/some/folder before training (the demo needs none)")
        elif not os.path.isdir(value):
            yield Finding(name, f"{value} does not exist", f"mkdir -p {value}, or correct {name}")
        elif not os.access(value, os.W_OK):
            yield Finding(name, f"{value} cannot be written", f"give yourself the right, or change {name}")
        else:
            yield Finding(name, value)


def torchvision_pair() -> Iterator[Finding]:
    """Whether torchvision fits torch: nnU-Net's search imports it, and finds no trainer at all when it does not."""
    if importlib.util.find_spec("torchvision") is None:
        remedy = "pip install torchvision (nnU-Net's own trainers import it)"
        yield Finding("torchvision", "not installed", remedy, fatal=True)
        return
    pair = f"torch {importlib.metadata.version('torch')}, torchvision {importlib.metadata.version('torchvision')}"
    process = _python("import torchvision")
    if process.returncode == 0:
        yield Finding("torch and torchvision", pair)
        return
    remedy = "install a pair of one release and one build (CPU or CUDA): pip install --upgrade torch torchvision"
    yield Finding("torch and torchvision", f"{pair} do not fit: {last_line(process.stderr)}", remedy, fatal=True)


def trainer_search() -> Iterator[Finding]:
    """Whether nnU-Net finds our trainers, from another folder and in a new process."""
    process = _python(_SEARCH)
    if f"FOUND {TRAINER}" in process.stdout:
        yield Finding("nnU-Net finds our trainers", "yes")
        return
    inspected = [line.split(":")[-1].strip() for line in process.stdout.splitlines() if "Inspecting module" in line]
    culprit = f" (after inspecting {inspected[-1]})" if inspected and inspected[-1] != "lightnets_trainers" else ""
    remedy = "if nothing above says FAIL, repair or remove the package that the message names, and look again"
    yield Finding("nnU-Net finds our trainers", f"no{culprit}: {last_line(process.stderr)}", remedy, fatal=True)


def device() -> Iterator[Finding]:
    """What torch computes on."""
    import torch

    if torch.cuda.is_available():
        yield Finding("device", f"cuda: {torch.cuda.get_device_name(0)}")
    elif torch.backends.mps.is_available():
        yield Finding("device", "mps: Apple GPU")
    else:
        remedy = "train with -device cpu" if torch.version.cuda is None else "no GPU is visible; train with -device cpu"
        yield Finding("device", f"cpu, {torch.get_num_threads()} threads", remedy)
    yield Finding("waiting threads", waiting())
    yield Finding("huge pages", huge_pages())


def scan_backends() -> Iterator[Finding]:
    """Each backend of the selective scan, or why it cannot run, and whether a fast one computes on this device."""
    import torch

    from nnunetv2_lightnets.nnunet.notices import scan_backend
    from nnunetv2_lightnets.ops import available_backends
    from nnunetv2_lightnets.ops.selective_scan.mamba_ssm import INSTALL, installed, without_scan

    on_gpu = torch.cuda.is_available()
    backends = available_backends()
    for name, reason in backends.items():
        found = "runs here" if reason is None else f"not here: {reason}"
        yield Finding(f"scan backend {name}", found, absent=bool(reason))
    if (version := installed()) is not None:
        incomplete = without_scan()
        reason = incomplete or backends["mamba_ssm"]
        value = f"{version}, which scans" if reason is None else f"{version} does not scan: {reason}"
        remedy = INSTALL if reason and (incomplete or on_gpu) else None
        yield Finding("mamba-ssm", value, remedy, absent=reason is not None)
    name, slow = scan_backend(torch.device("cuda" if on_gpu else "cpu"))
    on_device = f"scan on this {'GPU' if on_gpu else 'CPU'}"
    if slow is not None:
        yield Finding(on_device, *slow, fatal=on_gpu)
    elif on_gpu:
        yield Finding(on_device, f"backend {name}")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=os.sep)
