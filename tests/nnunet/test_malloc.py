"""Prediction and training on a CPU do not wait for the kernel to clear the same memory again and again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_lightnets.nnunet import malloc
from nnunetv2_lightnets.nnunet.available import available_main_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep its memory")

# In a process of its own: the setting is the process's, and other tests must not have made it before.
PREDICT = """
import resource
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.trainers import find_trainer

setting = patch_setting((96, 96, 96), 1, 3)
plans = PlansManager(setting.plans)
configuration = plans.get_configuration(setting.configuration)
network = find_trainer("nnUNetTrainerULite").build_network_architecture(plans, configuration, 1, 3, False).eval()
patch = torch.randn(1, 1, 96, 96, 96)
with torch.inference_mode():
    for _ in range(5):
        network(patch)
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(patch)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print("FAULTS", sorted(faults)[2])  # a single patch may still find no free block that is large enough
"""


# Older releases refuse a threshold above 32 MiB.
OLDER_GLIBC = """
import ctypes
import types
from nnunetv2_lightnets.nnunet import malloc

mallopt = ctypes.CDLL(None).mallopt

def refuse_high_threshold(option, value):
    return 0 if option == -3 and value > 1 << 25 else mallopt(option, value)

older = types.SimpleNamespace(mallopt=refuse_high_threshold)
malloc.ctypes = types.SimpleNamespace(CDLL=lambda name: older)
"""


def faults_of(code: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return int(done.stdout.split("FAULTS")[1])


@glibc
@pytest.mark.parametrize("before", ["", pytest.param(OLDER_GLIBC, marks=pytest.mark.slow)], ids=["this", "older"])
def test_a_patch_causes_no_page_faults(before: str) -> None:
    assert faults_of(before + PREDICT) < 2000  # 8 MB; without the setting there are some 330,000


TRAIN = """
import contextlib, io, os, resource
import torch
from nnunetv2_lightnets.nnunet import malloc
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer
from nnunetv2_lightnets.trainers import find_trainer

setting = patch_setting((256, 256), 1, 3)
with temporary_folders() as folder, contextlib.redirect_stdout(io.StringIO()):
    trainer = make_trainer(find_trainer("nnUNetTrainerULite"), setting, 4, folder, torch.device("cpu"))
batch = make_batch(trainer, setting.patch, 4)
trainer.network.train()
for _ in range(5):
    trainer.train_step(batch)
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.train_step(batch)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print("FAULTS", sorted(faults)[2])
"""


@glibc
@pytest.mark.slow
def test_a_training_step_causes_no_page_faults() -> None:
    assert faults_of(TRAIN) < 2000  # 8 MB


@glibc
@pytest.mark.slow
def test_it_can_be_switched_off() -> None:
    assert faults_of(TRAIN, **{malloc.SWITCH: "off"}) > 20_000


class Mallopt:
    """Glibc's functions, recorded and not called."""

    def __init__(self) -> None:
        self.options: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, option: int, value: int) -> int:
        self.options[option] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mallopt]:
    """A process in which nothing was computed, of a size that is known, with much memory left."""
    recorded = Mallopt()
    monkeypatch.setattr(malloc, "_glibc", lambda: recorded)
    monkeypatch.setattr(malloc, "_can_keep", lambda: True)
    monkeypatch.setattr(malloc, "_taken", lambda: 3 << 30)
    monkeypatch.setattr(malloc, "_left", lambda: 7 << 30)
    monkeypatch.setattr(malloc, "_SECONDS", -1.0)
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    for name, value in (("calls", 0), ("keeps", False), ("may_keep", True), ("looked", 0.0)):
        monkeypatch.setattr(malloc._Process, name, value)
    yield recorded


def test_memory_is_kept_from_the_second_step_on(process: Mallopt) -> None:
    assert [malloc.reuse_freed_memory() for _ in range(4)] == [False, True, True, True]
    assert process.options == {-3: 1 << 30, -1: -1} and not process.trimmed


def test_nothing_is_kept_where_twice_a_step_is_not_left(process: Mallopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "_left", lambda: 5 << 30)
    assert not any(malloc.reuse_freed_memory() for _ in range(4))
    assert not process.options


def test_all_goes_back_when_memory_gets_short(process: Mallopt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [malloc.reuse_freed_memory() for _ in range(3)] == [False, True, True]
    monkeypatch.setattr(malloc, "_left", lambda: 1 << 29)
    assert not malloc.reuse_freed_memory()
    assert process.trimmed == 1 and process.options[-1] == 64 << 20 and process.options[-3] == 32 << 20
    monkeypatch.setattr(malloc, "_left", lambda: 7 << 30)
    assert not malloc.reuse_freed_memory(), "it goes short again"


def test_nothing_is_kept_meanwhile_and_steps_count_anew(process: Mallopt) -> None:
    assert [malloc.reuse_freed_memory() for _ in range(2)] == [False, True]
    with malloc.nothing_kept():
        assert process.trimmed == 1 and process.options[-1] == 64 << 20
        assert not any(malloc.reuse_freed_memory() for _ in range(3))
    assert [malloc.reuse_freed_memory() for _ in range(3)] == [False, True, True]


@glibc
def test_what_this_process_took() -> None:
    before = malloc._taken()
    block: Any = bytearray(300 << 20)
    block[::4096] = b"1" * len(block[::4096])
    del block
    assert malloc._taken() >= min(before, 200 << 20)


def group(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_the_least_of_machine_and_control_groups_is_left(tmp_path: Path) -> None:
    group(tmp_path / "proc", {"meminfo": "MemTotal: 9000 kB\nMemAvailable:   8000 kB"})
    assert available_main_memory(tmp_path) == 8000 * 1024
    group(tmp_path / "proc/self", {"cgroup": "0::/job/step"})
    top = tmp_path / "sys/fs/cgroup"
    group(top / "job/step", {"memory.max": "max", "memory.current": 5, "memory.stat": "anon 3"})
    assert available_main_memory(tmp_path) == 8000 * 1024
    stat = "anon 3\ninactive_file 500"
    group(top / "job", {"memory.max": 5_000_000, "memory.current": 1_000_000, "memory.stat": stat})
    assert available_main_memory(tmp_path) == 4_000_500


def test_older_control_groups_in_a_container(tmp_path: Path) -> None:
    """Its path is that outside of the container."""
    group(tmp_path / "proc", {"meminfo": "MemAvailable:   8000 kB"})
    group(tmp_path / "proc/self", {"cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/"})
    limits = {"memory.limit_in_bytes": 3_000_000, "memory.usage_in_bytes": 2_999_000}
    group(tmp_path / "sys/fs/cgroup/memory", limits | {"memory.stat": "cache 1\ntotal_inactive_file 7"})
    assert available_main_memory(tmp_path) == 1_007
