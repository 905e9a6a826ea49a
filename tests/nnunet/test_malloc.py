"""Prediction on a CPU does not wait for the kernel to clear the same memory again and again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(patch)
print("FAULTS", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep its memory")
@pytest.mark.parametrize("before", ["", pytest.param(OLDER_GLIBC, marks=pytest.mark.slow)], ids=["this", "older"])
def test_a_patch_causes_no_page_faults(before: str) -> None:
    done = subprocess.run([sys.executable, "-c", before + PREDICT], capture_output=True, text=True, check=True)
    faults = int(done.stdout.split("FAULTS")[1])
    assert faults < 2000  # 8 MB; without the setting there are some 330,000
