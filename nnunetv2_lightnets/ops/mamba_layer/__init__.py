"""A whole Mamba layer as one operator, which keeps its input and little else for the backward pass.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, section 3.4,
and section 3.3.2 for computing again what the backward pass needs; the layer around the block: Liao et al.,
"LightM-UNet", arXiv 2403.05246, section 3.2.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.mamba_layer import operator as operator
from nnunetv2_lightnets.ops.mamba_layer.record import Layer

__all__ = ["Layer", "mamba_layer"]


def mamba_layer(layer: Layer) -> Tensor:
    """Compute a Mamba layer run by run of its tokens, forwards, and backwards from the last run to the first.

    With ``mamba`` as in :class:`nnunetv2_lightnets.networks.mamba.Mamba`; steps whose parameters are None are left
    out::

        x = relu(group_norm(tokens))
        out = mamba(layer_norm(x))
        out = proj(layer_norm(out + skip_scale * x))    # the same norm

    The backward pass computes a run again from the tokens, so that nothing but the tokens, the scan's states at the
    starts of runs and the group norm's moments is saved. Under autocast (``low``) the projections before the scan and
    the last one use the low precision, everything else float32.

    Returns:
        (B, L, Co) in the dtype of the tokens; under autocast in its dtype, or in float32 without ``proj_weight``.

    Raises:
        LightNetsError: For shapes, dtypes or devices that do not fit, or a forced scan backend that cannot take it.
    """
    fields = operator.arguments(layer)
    tensors = layer.tensors()
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    run = torch.ops.nnunetv2_lightnets.mamba_layer
    return cast(Tensor, run(*fields, save, torch.compiler.is_compiling())[0])
