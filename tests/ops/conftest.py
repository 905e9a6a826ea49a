"""What the operators' tests share: random scans, backends that run here, memory that is poisoned by NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nnunetv2_lightnets.ops import available_backends, selective_scan, use_backend
from nnunetv2_lightnets.ops.selective_scan import record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in available_backends().items():
        terminalreporter.write_line(f"scan backend {name}: {reason or 'available'}")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are fastest on one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Torch fills what it leaves uninitialised by NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Scan:
    """Arguments of a scan; ``tensors`` are u, delta, A, B, C, D, z, delta_bias."""

    tensors: tuple[Tensor | None, ...]
    delta_softplus: bool
    initial_state: Tensor | None = None

    def record(self) -> record.Scan:
        """As backends take it."""
        return record.Scan(*self.tensors, self.initial_state, None, self.delta_softplus)

    def part(self, tokens: slice, initial_state: Tensor | None) -> Scan:
        """Some of the tokens, from another initial state."""
        u, delta, A, B, C, D, z, bias = self.tensors
        u, delta, B, C, z = (None if x is None else x[..., tokens] for x in (u, delta, B, C, z))
        return replace(self, tensors=(u, delta, A, B, C, D, z, bias), initial_state=initial_state)

    def to(self, dtype: torch.dtype) -> Scan:
        """All tensors in ``dtype``, parameters in float32 at least, with their memory layout."""
        parameter = torch.float64 if dtype == torch.float64 else torch.float32
        u, delta, A, B, C, D, z, bias = self.tensors
        tokens = [None if x is None else x.to(dtype) for x in (u, delta, B, C, z)]
        A, D, bias = (None if x is None else x.to(parameter) for x in (A, D, bias))
        u, delta, B, C, z = tokens
        initial_state = None if self.initial_state is None else self.initial_state.to(parameter)
        return replace(self, tensors=(u, delta, A, B, C, D, z, bias), initial_state=initial_state)

    def run(self, backend: str, gradients: bool = True, grad_last_state: bool = True) -> dict[str, Tensor]:
        """Output, last state and, for a fixed random direction of both, all gradients."""
        tensors = (*self.tensors, self.initial_state)
        leaves = [None if x is None else x.detach().requires_grad_(gradients) for x in tensors]
        *arguments, initial_state = leaves
        with use_backend(backend):
            out, last_state = selective_scan(*arguments, self.delta_softplus, True, initial_state)
        results = {"out": out.detach(), "last_state": last_state.detach()}
        if gradients:
            generator = torch.Generator().manual_seed(7)
            # the same in all dtypes, as bfloat16 holds it exactly
            weights = [torch.randn(x.shape, generator=generator).bfloat16().double() for x in (out, last_state)]
            loss = (out.double() * weights[0]).sum()
            if grad_last_state:
                loss = loss + (last_state.double() * weights[1]).sum()
            given = [leaf for leaf in leaves if leaf is not None]
            names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
            names = tuple(name for name, leaf in zip(names, leaves, strict=True) if leaf is not None)
            found = torch.autograd.grad(loss, given, allow_unused=True)
            zeros = (torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, given, strict=True))
            results |= dict(zip(names, zeros, strict=True))
        return results


def _strided(shape: tuple[int, ...], layout: str, draw: Callable[..., Tensor]) -> Tensor:
    """A random tensor (..., C, L) in one of several memory layouts."""
    *outer, channels, length = shape
    if layout == "channels-last":
        return draw(*outer, length, channels).transpose(-1, -2)
    if layout == "sliced":  # as one part of a projection that makes several
        return draw(*outer, length, 2 * channels + 3)[..., 1 : 1 + channels].transpose(-1, -2)
    if layout == "strided":
        return draw(*outer, channels, 2 * length + 1)[..., 1::2]
    if layout == "expanded":  # the same for all channels
        return draw(*outer, 1, length).expand(*shape)
    return draw(*shape)


@pytest.fixture(scope="session")
def make_scan() -> Callable[..., Scan]:
    """Maker of random stable scans in float64."""

    def make(
        batch: int = 2,
        channels: int = 6,
        length: int = 70,
        state: int = 3,
        groups: int = 1,
        *,
        D: bool = True,
        z: bool = True,
        bias: bool = True,
        softplus: bool = True,
        initial: bool = False,
        layout: str = "contiguous",
        seed: int = 0,
    ) -> Scan:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def positive(*shape: int) -> Tensor:  # a step size that is not softplus of anything
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        tokens = (batch, channels, length)
        return Scan(
            (
                _strided(tokens, layout, normal),
                _strided(tokens, layout, normal if softplus else positive),
                -4 * positive(channels, state) - 0.01,
                _strided((batch, groups, state, length), layout, normal),
                _strided((batch, groups, state, length), layout, normal),
                normal(channels) if D else None,
                _strided(tokens, layout, normal) if z else None,
                (normal if softplus else positive)(channels) if bias else None,
            ),
            softplus,
            normal(batch, channels, state) if initial else None,
        )

    return make


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Comparison of results by name, with a tolerance relative to the largest expected value of each.

    Where a result may be a single number that all but cancels, ``floor`` says what size its terms have.
    """

    def check(
        results: dict[str, Tensor],
        expected: dict[str, Tensor],
        tolerance: float,
        context: object = "",
        floor: float = 0.0,
    ) -> None:
        assert results.keys() == expected.keys()
        for name, wanted in expected.items():
            scale = wanted.double().abs().max().clamp(min=floor)
            error = (results[name].double() - wanted.double()).abs().max()
            # written so that NaN fails
            assert error <= tolerance * scale, f"{name} is off by {error:.3g}, largest {scale:.3g} {context}"

    return check
