"""Tensors of 2 MB and more lie in huge pages, which the kernel hands out 500 times less often.

A feature map has thousands of pages of 4 kB, each of which costs an interruption before it is used first: nnU-Net's own
network spends a quarter of a training step on a CPU so. torch can ask the kernel for pages of 2 MB, as NumPy does by
itself, and has a variable that says so. Tensors then begin at a page, too, which leaves fewer gaps between them.

Imports nothing: the start-up file asks for it.
"""

import os
import sys

VARIABLE = "THP_MEM_ALLOC_ENABLE"  # torch's, read with the first tensor
_KERNEL = "/sys/kernel/mm/transparent_hugepage"  # where it is not there, torch's request would fail


def use_huge_pages() -> None:
    """Set it for this process and those that it starts; on Linux, unless the user has set it."""
    if sys.platform == "linux" and os.path.isdir(_KERNEL):
        os.environ.setdefault(VARIABLE, "1")


def huge_pages() -> str:
    """What this process has set, in words."""
    return f"{VARIABLE}={os.environ[VARIABLE]}" if VARIABLE in os.environ else "no: as torch comes"
