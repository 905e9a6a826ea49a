"""The C kernels with the 64-byte vectors of AVX-512, on machines without it: compilers make them of shorter ones.

The instructions are others then; lanes, shuffles, sums over lanes, tiles and their edges are those of AVX-512.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_lightnets.ops import native_library
from wheels import ROOT

pytestmark = pytest.mark.slow

TESTS = [Path(__file__).with_name(name) for name in ("test_native.py", "test_mamba_layer.py", "test_mamba_native.py")]
# setup.py itself compiles and links: what it knows of sources, precisions and flags is said nowhere else.
RUN = """
import sys
from pathlib import Path
import pytest, setuptools
from nnunetv2_lightnets.ops import native_library

folder, flags, *tests = sys.argv[1:]
setuptools.setup = lambda **settings: None
sys.path.insert(0, "")
import setup

setup.INSTRUCTION_SETS = {"baseline": flags}
native_library.LIBRARY = setup.BuildNative(setuptools.Distribution()).link(Path(folder))
assert native_library.instruction_sets() == ["baseline"], native_library.unavailable()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]))
"""


@pytest.mark.timeout(1200)
def test_all_tests_of_the_kernels_pass_with_16_lanes(tmp_path: Path) -> None:
    if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler here")
    flags = "-DVECTOR_BYTES=64"
    if "avx2" in native_library.instruction_sets():
        flags += " -mavx2 -mfma"  # products and sums in one rounding
    command = [sys.executable, "-c", RUN, tmp_path, flags, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
