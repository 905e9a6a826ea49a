"""The probe of a backend: it believes right results and no others, and what it computes is what networks compute."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.selective_scan import chunked, probe, reference, triton_scan
from nnunetv2_lightnets.ops.selective_scan.record import Scan, n_chunks

CPU = torch.device("cpu")


def _forward(change: Callable[[Tensor], Tensor]) -> probe.Forward:
    def changed(scan: Scan, save_states: bool) -> Any:
        out, *others = chunked.forward(scan, save_states)
        return (change(out), *others)

    return changed


def _backward(which: int, change: Callable[[Tensor], Tensor | None]) -> probe.Backward:
    def changed(*arguments: Any) -> Any:
        found = list(chunked.backward(*arguments))
        found[which] = change(found[which])  # type: ignore[arg-type]
        return tuple(found)

    return changed


@pytest.mark.parametrize("kind", probe.KINDS)
def test_right_results_are_believed_and_the_time_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nnunetv2_lightnets"):
        assert probe.fault("torch", kind, chunked.forward, chunked.backward, CPU) is None
    assert f"torch on cpu: {kind} scans" in caplog.text and "checked in " in caplog.text


@pytest.mark.parametrize("kind", probe.KINDS)
def test_one_wrong_number_is_enough(kind: str) -> None:
    def one_wrong(x: Tensor) -> Tensor:
        x = x.contiguous()
        x.view(-1)[7] += 1e-3 * x.abs().max()
        return x

    def nan(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 0, 0] = float("nan")
        return x

    right = chunked.forward, chunked.backward
    for forward, backward, what in (
        (_forward(one_wrong), right[1], "the output is wrong by"),
        (right[0], _backward(4, one_wrong), "the gradient of C is wrong by 0.001 of its largest value"),
        (right[0], _backward(2, nan), "the gradient of A is wrong by nan"),
        (right[0], _backward(7, lambda x: None), "there is no gradient of delta_bias"),
    ):
        reason = probe.fault("torch", kind, forward, backward, CPU)
        assert reason is not None and reason.startswith(f"of a small {kind} scan, ") and what in reason


def test_an_error_is_a_reason_in_one_line() -> None:
    def failing(scan: Scan, save_states: bool) -> Any:
        raise RuntimeError("ptxas fatal\nand more")

    reason = probe.fault("torch", "plain", failing, chunked.backward, CPU)
    assert reason == "a small plain scan fails (RuntimeError: ptxas fatal)"


@pytest.mark.parametrize("kind", probe.KINDS)
def test_the_scan_has_all_that_published_networks_have(kind: str) -> None:
    scan = probe.small_scan(kind, CPU)
    scan.check()
    assert scan.A.shape[-1] == 16 and scan.delta_softplus and scan.delta_bias is not None and scan.D is not None
    assert (scan.z is not None) == (kind == "plain") and (scan.order is not None) == (kind == "directional")
    assert n_chunks(scan.u.shape[2]) > 2 and scan.u.shape[2] % 64
    assert scan.u.stride(1) == scan.delta.stride(-2) == 1, "channels are neighbours"
    assert kind == "directional" or not scan.B.is_contiguous()
    assert all(x is None or x.abs().max() > 0.01 for x in probe.results(scan, reference.forward, reference.backward))


def test_too_little_memory_says_nothing_about_a_backend() -> None:
    def full(scan: Scan, save_states: bool) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probe.fault("torch", "plain", full, chunked.backward, CPU)


def test_a_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        assert probe.fault("torch", "plain", chunked.forward, chunked.backward, CPU) is None


@pytest.mark.parametrize("kind", probe.KINDS)
def test_only_tiles_that_were_proved_are_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For scans that are not measured, too."""
    forward, backward = triton_scan.FORWARD[2:], triton_scan.BACKWARD[1:]
    proof = triton_scan._Proof(None, forward, backward)
    monkeypatch.setattr(triton_scan, "_proofs", {(0, kind): proof})
    order = None if kind == "plain" else torch.zeros(1)
    scan: Any = SimpleNamespace(u=SimpleNamespace(device=torch.device("cuda", 0)), order=order, published=False)
    assert triton_scan._choose(scan, False, lambda tiles: None) == forward[0]
    assert triton_scan._choose(scan, True, lambda tiles: None) == backward[0]


def test_no_kernel_is_proved_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "_proofs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(LightNetsError, match="run the network once, forwards and backwards, and record the graph then"):
        triton_scan._proved(0, "plain")
    assert not triton_scan._proofs
