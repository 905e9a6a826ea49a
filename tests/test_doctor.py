"""The doctor names what is wrong and what to do, and its exit code says whether training works."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_lightnets import doctor
from nnunetv2_lightnets.discovery.environment import DISABLE, SHIM_FOLDER, VARIABLE
from nnunetv2_lightnets.nnunet.folders import FOLDERS
from nnunetv2_lightnets.ops.selective_scan import mamba_ssm
from nnunetv2_lightnets.ops.selective_scan.slow import slow_scan


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = doctor.run(argparse.Namespace())
    return code, capsys.readouterr().out


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the searches in their own processes would say on a sound installation."""
    answer = subprocess.CompletedProcess([], 0, f"FOUND {doctor.TRAINER}\n", "")
    monkeypatch.setattr(doctor, "_python", lambda code: answer)


@pytest.mark.slow
def test_a_sound_installation() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nnunetv2_lightnets.cli", "doctor"], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "[ ok ] nnU-Net finds our trainers" in done.stdout
    assert "scan backend native" in done.stdout and "scan backend torch" in done.stdout
    assert done.stdout.rstrip().endswith("-tr nnUNetTrainerLightMUNet")


@pytest.mark.parametrize("version", ["2.7.3", "2.9.0", "3.0"])
def test_another_nnunet(version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_processes(monkeypatch)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "nnunetv2" else real(name))
    code, text = report(capsys)
    assert code == 1
    assert f"[FAIL] nnunetv2                    {version}, not 2.8" in text and "pip install 'nnunetv2~=2.8.0'" in text


@pytest.mark.parametrize("version", ["2.8", "2.8.1", "2.8.0rc1"])
def test_any_release_of_this_minor_version_will_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert not any(finding.fatal for finding in doctor.versions())


def test_without_torch_it_says_so_and_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    real_version = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, text = report(capsys)
    assert code == 1
    assert "[FAIL] torch" in text and "-> pip install torch\n" in text


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([], "all that is used of it is there, but nobody has tested this release"),
        (["nnunetv2.x:T.train_step is missing"], "would not work: nnunetv2.x:T.train_step is missing"),
        ([f"{i} is missing" for i in range(9)], "0 is missing, 1 is missing, 2 is missing, and 6 more"),
        (None, "it cannot be used: ImportError: no module of this name"),
    ],
)
def test_the_next_release_is_refused_with_the_reason(
    faults: list[str] | None, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(code: str) -> subprocess.CompletedProcess[str]:
        if "contract" not in code:
            return subprocess.CompletedProcess([], 0, f"FOUND {doctor.TRAINER}\n", "")
        said = "" if faults is None else f"some noise\nCONTRACT {json.dumps(faults)}\n"
        return subprocess.CompletedProcess([], 0, said, "Traceback\nImportError: no module of this name\n")

    monkeypatch.setattr(doctor, "_python", answer)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.0" if name == "nnunetv2" else real(name))
    code, text = report(capsys)
    assert code == 1
    assert words in text and "-> pip install 'nnunetv2~=2.8.0'" in text


@pytest.mark.slow
def test_the_contract_is_read_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for nnU-Net's next minor release, here with all in place."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.0")
    (nnunet,) = (finding for finding in doctor.versions() if finding.what == "nnunetv2")
    assert nnunet.fatal and "all that is used of it is there" in nnunet.value


@pytest.mark.parametrize(
    ("cuda", "native", "mark"), [(True, None, "FAIL"), (False, "no C compiler", "note"), (False, None, None)]
)
def test_a_slow_scan(
    cuda: bool,
    native: str | None,
    mark: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backends = {"mamba_ssm": "not installed", "triton": "no C compiler", "native": native, "torch": None}
    monkeypatch.setattr("nnunetv2_lightnets.ops.available_backends", lambda: backends)
    monkeypatch.setattr("nnunetv2_lightnets.nnunet.notices.refusal", lambda name, *_: backends[name])
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    lines = [line for finding in doctor.scan_backends() for line in str(finding).splitlines()]
    assert "[ -- ] scan backend mamba_ssm      not here: not installed" in lines
    assert "[ ok ] scan backend torch          runs here" in lines
    assert not any("[ ok ]" in line and "not here" in line for line in lines)
    slow = [line for line in lines if "scan on this" in line]
    assert len(slow) == (mark is not None)
    if mark is not None:
        assert slow[0].startswith(f"[{mark}] scan on this {'GPU' if cuda else 'CPU'}")
    if cuda:  # the text of a training's log
        what, remedy = slow_scan(torch.device("cuda"), "triton: no C compiler; mamba_ssm: not installed")
        assert slow[0].endswith(what) and f"       -> {remedy}" in lines and "install gcc" in remedy


@pytest.mark.parametrize(
    ("cuda", "module", "reason", "said"),
    [
        (True, True, None, "[ ok ] mamba-ssm                   2.4.0, which scans"),
        (True, True, "no kernel; image", "[note] mamba-ssm                   2.4.0 does not scan: no kernel; image"),
        (False, True, "no CUDA", "[ -- ] mamba-ssm                   2.4.0 does not scan: no CUDA"),
        (
            False,
            False,
            "no CUDA",
            "[note] mamba-ssm                   2.4.0 does not scan: mamba-ssm 2.4.0 is installed wit",
        ),
    ],
)
def test_the_installed_mamba_ssm(
    cuda: bool, module: bool, reason: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("nnunetv2_lightnets.nnunet.notices.refusal", lambda name, *_: name != "triton" or None)
    monkeypatch.setattr("nnunetv2_lightnets.ops.available_backends", lambda: {"mamba_ssm": reason})
    assert not any(finding.what == "mamba-ssm" for finding in doctor.scan_backends())  # it is not installed
    monkeypatch.setattr(mamba_ssm, "version", lambda package: "2.4.0")
    if module:
        (tmp_path / "selective_scan_cuda.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    (found,) = (finding for finding in doctor.scan_backends() if finding.what == "mamba-ssm")
    assert str(found).startswith(said) and not found.fatal
    assert ("-> MAMBA_KEEP_CUDA_BUILD=TRUE pip install" in str(found)) == said.startswith("[note]")


def test_it_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setenv("NNUNET_LIGHTNETS_SCAN_BACKEND", "hub")
    lines = [str(finding) for finding in doctor.scan_backends()]
    assert "[ -- ] scan backend hub            not here: it is forced, and looked for when a scan runs" in lines


@pytest.mark.parametrize("unset", [[], ["nnUNet_raw"], ["nnUNet_raw", "nnUNet_results"]])
def test_it_is_ready_when_the_folders_are(
    unset: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    without_processes(monkeypatch)
    for name in FOLDERS:
        monkeypatch.setenv(name, str(tmp_path))
    for name in unset:
        monkeypatch.delenv(name)
    code, text = report(capsys)
    last = text.rstrip().splitlines()[-1]
    assert code == 0
    assert last.endswith(": nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerLightMUNet")
    start = {0: "Ready:", 1: "Ready once nnUNet_raw is set", 2: "Ready once nnUNet_raw, nnUNet_results are set"}
    assert last.startswith(start[len(unset)])


def test_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_processes(monkeypatch)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv(DISABLE, "1")
    code, text = report(capsys)
    assert code == 1 and f"-> unset {DISABLE}" in text


def test_what_stops_the_search_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = "Inspecting module: nnunetv2.training.x.someTrainer"
    failed = subprocess.CompletedProcess([], 1, said, "Traceback\nImportError: no such operator torchvision::nms\n")
    monkeypatch.setattr(doctor, "_python", lambda code: failed)
    code, text = report(capsys)
    assert code == 1
    assert "do not fit: ImportError: no such operator torchvision::nms" in text
    assert "no (after inspecting nnunetv2.training.x.someTrainer): ImportError" in text


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, f"{tmp_path / 'gone'}:{SHIM_FOLDER}")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "missing"))
    monkeypatch.delenv("nnUNet_results", raising=False)
    by_name = {finding.what: finding for finding in doctor.folders()}
    assert "gone does not exist" in by_name[VARIABLE].value
    assert by_name["nnUNet_raw"].remedy is None
    assert "mkdir -p" in str(by_name["nnUNet_preprocessed"])
    assert by_name["nnUNet_results"].value == "not set"
    assert not any(finding.fatal for finding in by_name.values())
