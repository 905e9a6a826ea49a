"""The C kernel with the 64-byte vectors of AVX-512, on machines without it: compilers make them of shorter ones.

The instructions are others then; lanes, shuffles, sums over lanes, tiles and their edges are those of AVX-512.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_lightnets
from nnunetv2_lightnets.ops import native_library

pytestmark = pytest.mark.slow

SOURCES = Path(nnunetv2_lightnets.__file__).parent / "ops" / "csrc"
FLAGS = "-O2 -std=gnu11 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
RUN = """
import sys
from pathlib import Path
import pytest
from nnunetv2_lightnets.ops import native_library
native_library.LIBRARY = Path(sys.argv[1])
assert native_library.instruction_sets() == ["baseline"], native_library.unavailable()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", sys.argv[2]]))
"""


@pytest.mark.timeout(1200)
def test_all_tests_of_the_kernel_pass_with_16_lanes(tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler here")
    fused = (
        ["-mavx2", "-mfma"] if "avx2" in native_library.instruction_sets() else []
    )  # products and sums in one rounding
    objects = []
    for source in ("scan_kernel", "conv_kernel", "dispatch", "threads", "memory"):
        for precision in ([], ["-DDOUBLE"]) if source.endswith("kernel") else ([],):
            objects.append(tmp_path / f"{source}{len(precision)}.o")
            more = ["-DVECTOR_BYTES=64", "-DSUFFIX=baseline", *precision, *fused]
            command = [compiler, *FLAGS.split(), *more, "-c", SOURCES / f"{source}.c", "-o", objects[-1]]
            subprocess.run(command, check=True)
    library = tmp_path / "wide.so"
    subprocess.run([compiler, "-shared", "-o", library, *objects, "-lpthread"], check=True)
    tests = Path(__file__).with_name("test_native.py")
    done = subprocess.run([sys.executable, "-c", RUN, library, tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
