"""Backend "hub": mamba-ssm's CUDA kernel, ready built, by Hugging Face's package ``kernels``. Only if forced.

Its first use downloads ``kernels-community/mamba-ssm`` in the build for this torch and CUDA: code of others, which runs
with the user's rights. So nothing takes this backend by itself, and no listing looks for it.

Sources: https://github.com/huggingface/kernels-community, mamba-ssm/torch-ext (Apache-2.0), for the operators, which
have the interface of mamba-ssm's own module; https://huggingface.co/docs/kernels for ``get_kernel``.
"""

from __future__ import annotations

import importlib

from nnunetv2_lightnets.ops.selective_scan.mamba_ssm import Functions, MambaKernel, Missing
from nnunetv2_lightnets.ops.tensors import in_one_line

NAME = "hub"
REPOSITORY = "kernels-community/mamba-ssm"
VERSION = 1  # of its interface; builds for later releases of torch are added to it


def _load() -> Functions:
    try:
        kernels = importlib.import_module("kernels")
    except ModuleNotFoundError as error:
        raise Missing("Hugging Face's package kernels is not installed; pip install kernels") from error
    try:
        module = kernels.get_kernel(REPOSITORY, version=VERSION)
    except Exception as error:  # no network, no build for this torch, a disk that is full
        reason = in_one_line(error).split(". ")[0]  # what follows may advise to trust everybody's code
        raise Missing(
            f"{REPOSITORY} cannot be loaded ({reason}). Its first use needs the network; "
            "later ones do without it if HF_HUB_OFFLINE=1 is set"
        ) from error
    operators = module._ops.ops
    return operators.selective_scan_fwd, operators.selective_scan_bwd


_kernel = MambaKernel(NAME, REPOSITORY, _load)
forward, backward, refuses, unavailable = _kernel.forward, _kernel.backward, _kernel.refuses, _kernel.unavailable
