"""Which backend computes a call, and what users hear about it."""

from __future__ import annotations

import logging
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.ops import available_backends, directional_scan, scan_order, selective_scan, use_backend
from nnunetv2_lightnets.ops.selective_scan import chunked, dispatch, mamba_ssm, reference, triton_scan
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from tests.ops.operator_call import operator_arguments

ENVIRONMENT_VARIABLE = "NNUNET_LIGHTNETS_SCAN_BACKEND"


def _used(monkeypatch, *modules):
    """Records the backends that compute forward and backward passes."""
    used = []

    def record(compute, name):
        return lambda *arguments: used.append(name) or compute(*arguments)

    for module in modules:
        for way in ("forward", "backward"):
            monkeypatch.setattr(module, way, record(getattr(module, way), f"{module.NAME} {way}"))
    return used


def test_all_backends_are_listed_with_a_reason_or_none():
    backends = available_backends()
    assert list(backends) == ["mamba_ssm", "triton", "native", "torch", "reference"]
    assert backends["torch"] is None and backends["reference"] is None
    if not torch.cuda.is_available():
        assert "CUDA" in backends["mamba_ssm"] and "CUDA" in backends["triton"]


def test_cpu_takes_native_then_torch_and_never_the_reference(make_scan, monkeypatch):
    scan = make_scan(length=3).record()
    expected = "native" if available_backends()["native"] is None else "torch"
    assert expected == dispatch.choose(scan).NAME
    refused = types.SimpleNamespace(NAME="native", unavailable=lambda: None, refuses=lambda *_: "it does not like this")
    real = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda name: refused if name == "native" else real(name))
    assert dispatch.choose(scan).NAME == "torch"
    with pytest.raises(LightNetsError, match=r"'native' cannot take this call: it does not like this"):
        dispatch.choose(scan, "native")


def test_a_backend_whose_module_breaks_is_unavailable_with_the_reason(make_scan, monkeypatch):
    def broken(name):
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    dispatch._load.cache_clear()
    try:
        assert "RuntimeError: undefined symbol" in available_backends()["triton"]
        with use_backend("triton"), pytest.raises(LightNetsError, match="undefined symbol"):
            selective_scan(*make_scan(length=3).tensors)
    finally:
        dispatch._load.cache_clear()


def test_use_backend_forces_nests_and_ends(make_scan, monkeypatch):
    scan = make_scan(length=3).tensors
    used = _used(monkeypatch, reference, chunked)
    with use_backend("reference"):
        selective_scan(*scan)
        with use_backend("torch"):
            selective_scan(*scan)
        selective_scan(*scan)
    assert used == ["reference forward", "torch forward", "reference forward"]
    with pytest.raises(ValueError, match="inside"), use_backend("reference"):
        raise ValueError("inside")
    assert dispatch.forced_backend() == ""


def test_gradients_use_the_backend_that_was_forced_for_the_output(make_scan, monkeypatch):
    used = _used(monkeypatch, reference, chunked)
    leaves = [x.requires_grad_() for x in make_scan(length=3).tensors]
    with use_backend("reference"):
        out = selective_scan(*leaves)
    out.sum().backward()
    assert used == ["reference forward", "reference backward"]


def test_forcing_ends_at_the_thread(make_scan):
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [""]


def test_environment_variable_forces_and_use_backend_wins(make_scan, monkeypatch):
    used = _used(monkeypatch, reference, chunked)
    scan = make_scan(length=3).tensors
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    selective_scan(*scan)
    with use_backend("torch"):
        selective_scan(*scan)
    assert used == ["reference forward", "torch forward"]


def test_unknown_names_are_refused_with_those_that_exist(make_scan, monkeypatch):
    names = "mamba_ssm, triton, native, torch, reference"
    with pytest.raises(LightNetsError, match=f"use_backend: there is no scan backend 'cuda'; use one of {names}"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(LightNetsError, match=f"{ENVIRONMENT_VARIABLE}: there is no scan backend 'fast'"):
        selective_scan(*make_scan(length=3).tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["mamba_ssm", "triton"])
def test_forcing_a_backend_that_cannot_run_raises_with_the_reason(name, make_scan):
    with use_backend(name), pytest.raises(LightNetsError, match=rf"'{name}' cannot take this call: .*CUDA"):
        selective_scan(*make_scan(length=3).tensors)


def test_the_choice_is_logged_once(make_scan, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    scan = make_scan(length=3).tensors
    with caplog.at_level(logging.INFO, logger="nnunetv2_lightnets"):
        for _ in range(3):
            with use_backend("torch"):
                selective_scan(*scan)
            with use_backend("reference"):
                selective_scan(*scan)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" (")[0] for message in messages] == [
        "selective scan on cpu: backend 'torch'",
        "selective scan on cpu: backend 'reference'",
    ]


def test_a_slow_backend_on_a_gpu_is_a_warning_with_the_reasons(caplog, monkeypatch):
    """Which users of nnU-Net see: it shows no lower level."""
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(triton_scan, "unavailable", lambda: "Triton cannot be imported")
    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: "it is not installed")
    scan = types.SimpleNamespace(u=types.SimpleNamespace(device=types.SimpleNamespace(type="cuda")))
    with caplog.at_level(logging.WARNING, logger="nnunetv2_lightnets"):
        for _ in range(2):
            assert dispatch.choose(scan).NAME == "torch"
        with use_backend("torch"):
            dispatch.choose(scan)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for words in ("'torch'", "Triton cannot be imported", "it is not installed", "needs a C compiler", "doctor"):
        assert words in record.getMessage()


# mamba-ssm: a stand-in for its compiled module, as mamba-ssm itself cannot be built without a GPU.


def _scan_of_mamba(calls):
    """A module like selective_scan_cuda, which keeps its states in a form of its own and ungated outputs apart."""

    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        calls.append("fwd")
        assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C, *([] if z is None else [z])))
        scan = Scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus=delta_softplus)
        out, last_state, _ = reference.forward(scan, False)
        states = torch.zeros(*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
        states[:, :, -1, 1::2] = last_state
        return [out, states] if z is None else [out, states, out * torch.nn.functional.silu(z)]

    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        calls.append("bwd")
        assert x.shape[-1] == 2 * A.shape[1] and dz is None and not recompute_out_z
        scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus)
        if z is not None:
            torch.testing.assert_close(out, reference.forward(replace(scan, z=None), False)[0])
        *grads, dz, dbias, _ = reference.backward(scan, (dout, None), torch.empty(0))
        return [*grads, dbias] if z is None else [*grads, dbias, dz]

    module = types.ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = fwd, bwd
    return module


@pytest.fixture
def fake_mamba(monkeypatch):
    """Installs a module as selective_scan_cuda, with CPU tensors standing for those of a GPU."""

    def install(module):
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(mamba_ssm, "DEVICE", "cpu")
        mamba_ssm.unavailable.cache_clear()
        return mamba_ssm.unavailable()

    yield install
    mamba_ssm.unavailable.cache_clear()


@pytest.mark.parametrize("options", [{}, {"z": False, "D": False, "bias": False}, {"layout": "channels-last"}])
def test_mamba_ssm_computes_outputs_and_gradients(options, fake_mamba, make_scan, assert_close):
    calls = []
    assert fake_mamba(_scan_of_mamba(calls)) is None
    assert available_backends()["mamba_ssm"] is None
    scan = make_scan(length=70, groups=2, **options).to(torch.float32)
    wanted = scan.to(torch.float64).run("reference", grad_last_state=False)
    calls.clear()
    assert_close(scan.run("mamba_ssm", grad_last_state=False), wanted, 1e-5)
    assert calls == ["fwd", "fwd", "bwd"]
    # gradients of the last state, which its kernel does not take, come from elsewhere
    assert_close(scan.run("mamba_ssm"), scan.to(torch.float64).run("reference"), 1e-5)


def test_mamba_ssm_scans_in_directions(fake_mamba):
    fake_mamba(_scan_of_mamba([]))
    order = scan_order((3, 4))
    tensors = [torch.randn(2, 5, 12), torch.randn(2, 4, 5, 12), -torch.rand(4, 5, 2)]
    tensors += [torch.randn(2, 4, 2, 12), torch.randn(2, 4, 2, 12)]
    results = {}
    for name in ("mamba_ssm", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with use_backend(name):
            y = directional_scan(*leaves, delta_softplus=True, order=order)
        results[name] = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    for ours, wanted in zip(results["mamba_ssm"], results["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_mamba_ssm_saves_no_states(fake_mamba, make_scan):
    """And no memory for them, except in graphs, which rely on their size."""
    fake_mamba(_scan_of_mamba([]))
    scan = make_scan(length=70).to(torch.float32).record()
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in operator_arguments(scan)]
    results = []
    for name, traced, saved in (("mamba_ssm", False, 0), ("mamba_ssm", True, 72), ("reference", False, 72)):
        with use_backend(name):
            out, _, states, _ = torch.ops.nnunetv2_lightnets.selective_scan(*leaves, True, traced)
        assert states.numel() == saved
        results.append(torch.autograd.grad(out.square().sum(), [x for x in leaves if isinstance(x, torch.Tensor)]))
    for gradients in results[:-1]:
        for x, y in zip(gradients, results[-1], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_mamba_ssm_leaves_initial_states_to_others(fake_mamba, make_scan, monkeypatch):
    """Its kernel has no such argument: the call goes on to the next backend."""
    fake_mamba(_scan_of_mamba([]))
    monkeypatch.setitem(dispatch._PREFERRED, "cpu", ("mamba_ssm", "torch"))
    scan = make_scan(length=5, initial=True).to(torch.float32).record()
    assert dispatch.choose(replace(scan, initial_state=None)).NAME == "mamba_ssm"
    assert dispatch.choose(scan).NAME == "torch"
    with pytest.raises(LightNetsError, match="initial_state is given"):
        dispatch.choose(scan, "mamba_ssm")


def test_mamba_ssm_refuses_calls_that_its_kernel_cannot_take(fake_mamba, make_scan):
    fake_mamba(_scan_of_mamba([]))
    with use_backend("mamba_ssm"):
        with pytest.raises(LightNetsError, match=r"u is torch\.float64"):
            selective_scan(*make_scan(length=3).tensors)
        with pytest.raises(LightNetsError, match="A has 300 states"):
            selective_scan(*make_scan(length=3, state=300).to(torch.float32).tensors)
        mamba_ssm.DEVICE = "cuda"
        with pytest.raises(LightNetsError, match="u is on cpu"):
            selective_scan(*make_scan(length=3).to(torch.float32).tensors)


def test_broken_builds_of_mamba_ssm_cost_only_that_backend(fake_mamba, make_scan):
    def raises(*_):
        raise RuntimeError("no kernel image is available for execution on the device\nCUDA kernel errors might be ...")

    def wrong(*arguments):
        *rest, gated = _scan_of_mamba([]).fwd(*arguments)
        return [*rest, gated + 1]

    crashing, lying, half = (_scan_of_mamba([]) for _ in range(3))
    crashing.fwd, lying.fwd = raises, wrong
    del half.bwd
    reason = fake_mamba(crashing)
    assert "no kernel image" in reason and "\n" not in reason
    assert "wrong results" in fake_mamba(lying)
    assert "AttributeError" in fake_mamba(half)
    assert "cannot be imported" in fake_mamba(None)  # as Python blocks a module
    selective_scan(*make_scan(length=3).tensors)
    with use_backend("mamba_ssm"), pytest.raises(LightNetsError, match="cannot be imported"):
        selective_scan(*make_scan(length=3).tensors)


def test_mamba_ssm_whose_import_raises_is_unavailable(fake_mamba, tmp_path, monkeypatch):
    (tmp_path / "selective_scan_cuda.py").write_text("raise OSError('libcudart.so.11.0: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mamba_ssm.unavailable.cache_clear()
    assert "libcudart" in mamba_ssm.unavailable()
    mamba_ssm.unavailable.cache_clear()
