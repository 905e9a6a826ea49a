"""What a backend of the scan is, whatever computes it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan


class Backend(Protocol):
    """What the module of a backend offers.

    ``forward`` and ``backward`` get only scans that have passed :meth:`Scan.check`, whose ``order`` holds permutations,
    and that the backend does not refuse. All results have the dtype and memory layout of ``torch.empty_like`` of the
    tensor that they belong to (the output: of ``u``); the last state is dense, in the dtype of computation.
    """

    NAME: str

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine and its current GPU, None if it can."""

    def refuses(self, scan: Scan) -> str | None:
        """Why it cannot take this call, None if it can."""

    def forward(self, scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, D, L), last state (B, [K,] D, N), and what :meth:`backward` needs beside the scan.

        The latter are the states (B, K, chunk, N, D) before all chunks, flat; or empty without ``save_states``, and
        where a backend needs none.
        """

    def backward(self, scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
        """Gradients of the scan's tensors.

        Args:
            scan: The scan.
            grads: Gradients of the output, (B, D, L), and of the last state, (B, [K,] D, N).
            states: What :meth:`forward` of the same backend has saved; empty if it was not told to.
        """
