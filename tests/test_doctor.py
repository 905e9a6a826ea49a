"""The doctor names what is wrong and what to do, and its exit code says whether training works."""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_lightnets import doctor
from nnunetv2_lightnets.discovery.environment import DISABLE, SHIM_FOLDER, VARIABLE


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
