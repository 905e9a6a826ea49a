"""The selective scan as published networks run it without a GPU: the baseline that users have today.

mamba-ssm's fallback (``selective_scan_ref`` in https://github.com/state-spaces/mamba) computes decays and inputs of all
tokens and states at once, tensors of (B, D, L, N), then walks over slices of them. The backend "reference" of this
package computes the same token by token, in less memory and, for many channels, several times faster: a comparison
with that one would say little about today's users.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops import use_backend
from nnunetv2_lightnets.ops.selective_scan import reference
from nnunetv2_lightnets.ops.selective_scan.gather import with_orders
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from nnunetv2_lightnets.ops.tensors import in_layout_of


@with_orders
def published_scan(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a backend's ``forward`` returns, without states for a backward pass: there is none."""
    u, delta, A, B, C, D, z, delta_bias, state = scan.tensors()
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if scan.delta_softplus else step
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))  # (B, D, N, L)
    decays = torch.exp(torch.einsum("bdl,dn->bdln", step, A))
    inputs = torch.einsum("bdl,bdnl,bdl->bdln", step, B, u)
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if state is None else state
    outputs = []
    for token in range(u.shape[2]):
        state = decays[:, :, token] * state + inputs[:, :, token]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[:, :, :, token]))
    y = torch.stack(outputs, dim=2)
    y = y if D is None else y + u * D[:, None]
    return in_layout_of(u, y if z is None else y * F.silu(z)), state, u.new_empty(0)


@contextmanager
def use_published_scan() -> Iterator[None]:
    """All scans are computed so, along the directions of an image after gathering each; gradients are off.

    Off, because the loop's own take time quadratic in the length (every slice of (B, D, L, N) has a gradient of its
    size), and those of another backend would be another implementation's.
    """
    with mock.patch.object(reference, "forward", published_scan), use_backend(reference.NAME), torch.no_grad():
        yield
