"""The sections of ``benchmarks/gpu.py``. They run on a machine that has PyTorch, Triton, NumPy and SciPy alone.

Importing this package first makes the checkout importable where nothing is installed: ``trainers/`` and ``plans/`` at
its root are then the packages ``nnunetv2_lightnets.trainers`` and ``nnunetv2_lightnets.plans``, as in a wheel.
"""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("nnunetv2_lightnets") is None:
    sys.path.insert(0, str(_ROOT))
if importlib.util.find_spec("nnunetv2_lightnets.trainers") is None:
    import nnunetv2_lightnets

    nnunetv2_lightnets.__path__.append(str(_ROOT))
