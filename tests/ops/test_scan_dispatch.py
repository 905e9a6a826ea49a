"""Which backend computes a call, and what users hear about it."""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.ops import available_backends, directional_scan, scan_order, selective_scan, tuning, use_backend
from nnunetv2_lightnets.ops.scan_order import check_order
from nnunetv2_lightnets.ops.selective_scan import (
    chunked,
    dispatch,
    hub,
    mamba_ssm,
    measured,
    probe,
    reference,
    slow,
    triton_scan,
)
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from tests.ops.operator_call import operator_arguments
from tests.ops.test_tuning import Card

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
    assert list(backends) == ["mamba_ssm", "triton", "native", "torch", "reference", "hub"]
    assert backends["torch"] is None and backends["reference"] is None
    if not torch.cuda.is_available():
        assert "CUDA" in backends["mamba_ssm"] and "CUDA" in backends["triton"]


def test_a_listing_survives_a_wrong_name(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    assert available_backends()["torch"] is None


def test_backends_are_asked_for_the_gpu_of_the_tensors(monkeypatch):
    current = [0]

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    asked = []
    backend = types.SimpleNamespace(
        NAME="triton", unavailable=lambda: asked.append(current[-1]), refuses=lambda scan: asked.append(current[-1])
    )
    real = dispatch._load
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(dispatch, "_load", lambda name: backend if name == "triton" else real(name))
    dispatch.choose(types.SimpleNamespace(u=types.SimpleNamespace(device=torch.device("cuda", 1))))
    assert asked == [1, 1] and current == [0]
    available_backends(torch.device("cuda", 2))
    available_backends()
    assert asked == [1, 1, 2, 0]


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
    names = "mamba_ssm, triton, native, torch, reference, hub"
    with pytest.raises(LightNetsError, match=f"use_backend: there is no scan backend 'cuda'; use one of {names}"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(LightNetsError, match=f"{ENVIRONMENT_VARIABLE}: there is no scan backend 'fast'"):
        selective_scan(*make_scan(length=3).tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["mamba_ssm", "triton", "hub"])
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
    scan = types.SimpleNamespace(u=types.SimpleNamespace(device=torch.device("cuda")))
    with caplog.at_level(logging.WARNING, logger="nnunetv2_lightnets"):
        for _ in range(2):
            assert dispatch.choose(scan).NAME == "torch"
        with use_backend("torch"):
            dispatch.choose(scan)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for words in ("'torch'", "Triton cannot be imported", "it is not installed", "needs a C compiler", "doctor"):
        assert words in record.getMessage()


# What is measured where two fast backends can: stand-ins for the backends, and for the measurement.


def _fast(name, takes=lambda scan: None):
    """A fast backend that computes by "torch"."""
    return types.SimpleNamespace(
        NAME=name, unavailable=lambda: None, refuses=takes, forward=chunked.forward, backward=chunked.backward
    )


@pytest.fixture
def two_fast(monkeypatch):
    """Both fast backends run here; ``takes`` says what mamba_ssm takes, ``winner`` is measured to be the fastest.

    Gives the names, keys and candidates that were measured.
    """

    def install(winner=None, takes=lambda scan: None):
        backends = {"triton": _fast("triton"), "mamba_ssm": _fast("mamba_ssm", takes)}
        real, measured_choices = dispatch._load, []

        def choose(name, key, candidates, run, device):
            measured_choices.append((name, key, candidates))
            for candidate in candidates:
                run(candidate)
            return candidates[0] if winner is None else winner

        monkeypatch.setattr(dispatch, "_load", lambda name: backends.get(name) or real(name))
        monkeypatch.setitem(dispatch.FAST, "cpu", dispatch.FAST["cuda"])
        monkeypatch.setattr(measured, "SIZES", {kind: (4, (3, 3)) for kind in probe.KINDS})
        monkeypatch.setattr(measured.tuning, "choose", choose)
        return measured_choices

    return install


@pytest.mark.parametrize("winner", ["triton", "mamba_ssm"])
def test_the_faster_of_two_is_taken_for_plain_and_for_directional_scans(winner, two_fast, make_scan):
    choices = two_fast(winner)
    plain = make_scan(length=5).to(torch.float32).record()
    assert winner == dispatch.choose(plain).NAME
    assert winner == dispatch.choose(probe.small_scan("directional", "cpu", 4, 12)).NAME
    half = make_scan(length=9).to(torch.bfloat16).record()
    assert winner == dispatch.choose(half).NAME
    assert [key[:2] for _, key, _ in choices] == [
        ("plain scans", "float32"),
        ("directional scans", "float32"),
        ("plain scans", "bfloat16"),
    ]
    assert all(name == "backend" and key[2].startswith("mamba-ssm ") for name, key, _ in choices)
    # the first is the default
    assert all(candidates == ("triton", "mamba_ssm") for *_, candidates in choices)
    assert dispatch.fastest(["triton", "mamba_ssm"], "directional", torch.device("cpu")) == winner


def test_the_choice_is_kept_on_disk_and_said(two_fast, make_scan, monkeypatch, tmp_path, caplog):
    """By the real function, on a card that is made up."""
    choose, card = tuning.choose, Card(monkeypatch, tmp_path)
    two_fast()
    monkeypatch.setattr(measured.tuning, "choose", lambda *arguments: choose(*arguments[:-1], torch.device("cuda", 0)))
    card.times = {"triton": 3.0, "mamba_ssm": 2.0}
    scan = make_scan(length=5).to(torch.float32).record()
    card.capturing = True
    assert dispatch.choose(scan).NAME == "triton"  # a default, and not kept
    card.capturing = False
    with caplog.at_level(logging.INFO, logger="nnunetv2_lightnets"):
        assert dispatch.choose(scan).NAME == "mamba_ssm"
    assert "backend: plain scans" in caplog.text and "from now on mamba_ssm" in caplog.text
    card.times = {"triton": 1.0, "mamba_ssm": 2.0}
    for _ in range(2):  # from memory, and as the next process
        assert dispatch.choose(scan).NAME == "mamba_ssm"
        card.forget()
    assert dispatch.choose(probe.small_scan("directional", "cpu", 4, 12)).NAME == "triton"
    ((place, entries),) = json.loads((tmp_path / tuning.FILE).read_text()).items()
    assert place == "Card A"
    assert entries == {
        "backend: plain scans, float32, mamba-ssm of unknown version": {
            "chosen": "mamba_ssm",
            "milliseconds": {"triton": 3.0, "mamba_ssm": 2.0},
        },
        "backend: directional scans, float32, mamba-ssm of unknown version": {
            "chosen": "triton",
            "milliseconds": {"triton": 1.0, "mamba_ssm": 2.0},
        },
    }


def test_the_key_is_one_for_all_shapes(two_fast, make_scan):
    choices = two_fast()
    for length, channels in ((5, 6), (70, 2)):
        dispatch.choose(make_scan(length=length, channels=channels).to(torch.float32).record())
    assert choices[0][1] == choices[1][1]


def test_a_single_fast_backend_costs_no_measurement(two_fast, make_scan):
    choices = two_fast("mamba_ssm", takes=lambda scan: scan.initial_state is not None and "an initial_state is given")
    scan = make_scan(length=5, initial=True).to(torch.float32).record()
    assert dispatch.choose(scan).NAME == "triton" and not choices
    assert dispatch.choose(scan, "triton").NAME == "triton" and not choices
    assert dispatch.choose(replace(scan, initial_state=None)).NAME == "mamba_ssm" and len(choices) == 1


@pytest.mark.parametrize("kind", probe.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_measured_is_a_scan_of_the_call_s_kind(kind, dtype, monkeypatch):
    monkeypatch.setattr(measured, "SIZES", {kind: (4, (3, 5))})
    random = torch.get_rng_state()
    scan = measured.scan_of_size(kind, dtype, torch.device("cpu"))
    if dtype != torch.float64:  # whose parameters are in float64, too
        scan.check()
    assert torch.equal(random, torch.get_rng_state())
    assert scan.u.dtype == dtype and scan.u.shape[1:] == (4, 15) and scan.u.stride(1) == 1
    assert probe.kind_of(scan) == kind
    if scan.order is not None:  # along rows and along columns
        check_order(scan.order)
        assert scan.order[:, :3].tolist() == [[0, 1, 2], [0, 5, 10]]


def test_how_slow_the_slow_backend_is_here(monkeypatch):
    times = []
    monkeypatch.setattr(measured, "_median_seconds", lambda run, device: times.append(run()) or (0.5 / len(times)))
    assert measured.slowdown(torch.device("cpu")) == 2  # the scan takes 0.5, the copy 0.25
    monkeypatch.undo()
    assert measured.slowdown(torch.device("cpu")) > 1

    def broken(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(chunked, "forward", broken)
    assert measured.slowdown(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("triton: no C compiler for Triton's driver: install gcc", "install gcc (apt install gcc"),
        ("triton: no Python headers for Triton's driver", "apt install python3-dev"),
        ("triton: Triton is not installed: it comes with torch", "torch for CUDA"),
        ("triton: Tesla P100 has compute capability 6.0, and Triton needs 7.5", "a newer GPU, mamba-ssm"),
        ("triton: torch is built for ROCm", "a network without a scan"),
        ("triton: Triton is not installed: there is no official build for Windows", "WSL"),
        ("triton: a kernel of a few lines fails", "needs a C compiler (gcc)"),
    ],
)
def test_the_remedy_is_that_of_the_reason(reason, remedy, monkeypatch):
    monkeypatch.setattr(slow, "slowdown", lambda device: 412.4)
    what, found = slow.slow_scan(torch.device("cuda"), reason)
    assert what.startswith("selective scan on cuda: backend 'torch', whose forward pass takes 412 times as long as ")
    assert what.endswith(f"(measured here); {reason}") and "\n" not in what
    assert remedy in found


def test_a_warning_that_was_given_is_not_given_again(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(triton_scan, "unavailable", lambda: "Triton cannot be imported")
    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: "it is not installed")
    dispatch.announced(torch.device("cuda"), "torch")
    with caplog.at_level(logging.INFO, logger="nnunetv2_lightnets"):
        scan = types.SimpleNamespace(u=types.SimpleNamespace(device=torch.device("cuda")))
        dispatch.choose(scan, "reference")
        dispatch.choose(scan)
    assert [record.levelno for record in caplog.records] == [logging.INFO]  # the forced one


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
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(triton_scan, "unavailable", lambda: "there is no GPU for it")
        monkeypatch.setattr(mamba_ssm, "DEVICE", "cpu")
        monkeypatch.setattr(dispatch, "small_scan", lambda kind, device: probe.small_scan(kind, "cpu"))
        mamba_ssm._kernel.forget()
        return mamba_ssm.unavailable()

    yield install
    mamba_ssm._kernel.forget()


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
    monkeypatch.setitem(dispatch.FAST, "cpu", ("mamba_ssm",))
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
    assert "is wrong by" in fake_mamba(lying)
    assert "AttributeError" in fake_mamba(half)
    assert "cannot be imported" in fake_mamba(None)  # as Python blocks a module
    selective_scan(*make_scan(length=3).tensors)
    with use_backend("mamba_ssm"), pytest.raises(LightNetsError, match="cannot be imported"):
        selective_scan(*make_scan(length=3).tensors)


def test_mamba_ssm_whose_import_raises_is_unavailable(fake_mamba, tmp_path, monkeypatch):
    (tmp_path / "selective_scan_cuda.py").write_text("raise OSError('libcudart.so.11.0: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mamba_ssm._kernel.forget()
    assert "libcudart" in mamba_ssm.unavailable()
    mamba_ssm._kernel.forget()


@pytest.mark.parametrize("way", ["fwd", "bwd"])
@pytest.mark.parametrize("kind", probe.KINDS)
def test_a_build_is_proved_forwards_and_backwards_for_both_kinds(kind, way, fake_mamba):
    """Of which a directional scan is one with two groups, here."""
    module = _scan_of_mamba([])
    right = getattr(module, way)

    def wrong(u, delta, A, B, *arguments):
        *others, last = right(u, delta, A, B, *arguments)
        return [*others, last * 1.01 if (B.shape[1] == 2) == (kind == "directional") else last]

    setattr(module, way, wrong)
    reason = fake_mamba(module)
    assert reason.startswith(f"mamba-ssm's kernel: of a small {kind} scan, the ") and "is wrong by 0.01" in reason


def test_a_build_is_proved_on_every_gpu(fake_mamba, monkeypatch):
    """Once on each: a build may hold no code for one of two cards."""
    calls = []
    assert fake_mamba(_scan_of_mamba(calls)) is None
    tried = len(calls)
    assert mamba_ssm.unavailable() is None and len(calls) == tried
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(mamba_ssm.torch, "device", lambda *_: "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "cannot be while a CUDA graph is recorded" in mamba_ssm.unavailable() and len(calls) == tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert mamba_ssm.unavailable() is None and len(calls) == 2 * tried


def test_a_mamba_ssm_without_its_scan_is_named_with_the_remedy(fake_mamba, monkeypatch):
    assert "mamba-ssm is not installed" in fake_mamba(None)
    monkeypatch.setattr(mamba_ssm, "version", lambda package: "2.4.0")
    reason = fake_mamba(None)
    assert reason.startswith("mamba-ssm 2.4.0 is installed without its scan (there is no module selective_scan_cuda)")
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation" in reason


# Hugging Face's kernels: a stand-in for the package and for what it loads.


@pytest.fixture
def fake_hub(fake_mamba, monkeypatch):
    """Installs a package called kernels, with CPU tensors standing for those of a GPU; gives what it was asked for."""
    fake_mamba(None)
    asked = []

    def install(get_kernel):
        def recorded(repository, **options):
            asked.append((repository, options))
            return get_kernel()

        package = None if get_kernel is None else types.SimpleNamespace(get_kernel=recorded)
        monkeypatch.setitem(sys.modules, "kernels", package)
        hub._kernel.forget()
        return asked

    yield install
    hub._kernel.forget()


def _hub_module(calls):
    module = _scan_of_mamba(calls)
    operators = types.SimpleNamespace(selective_scan_fwd=module.fwd, selective_scan_bwd=module.bwd)
    return types.SimpleNamespace(_ops=types.SimpleNamespace(ops=operators))


def test_the_hub_is_only_asked_when_forced(fake_hub, make_scan, assert_close, monkeypatch):
    calls = []
    asked = fake_hub(lambda: _hub_module(calls))
    scan = make_scan(length=70, groups=2).to(torch.float32)
    assert available_backends()["hub"].startswith("not asked for; NNUNET_LIGHTNETS_SCAN_BACKEND=hub")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "hub")
    assert available_backends()["hub"] == "it is forced, and looked for when a scan runs"
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    monkeypatch.setitem(dispatch.FAST, "cpu", ())
    assert dispatch.choose(scan.record()).NAME == "torch"
    assert not asked and not calls
    wanted = scan.to(torch.float64).run("reference", grad_last_state=False)
    assert_close(scan.run("hub", grad_last_state=False), wanted, 1e-5)
    assert calls[-3:] == ["fwd", "fwd", "bwd"]
    assert asked == [("kernels-community/mamba-ssm", {"version": 1})]


def test_the_hub_is_refused_with_its_reason(fake_hub, make_scan):
    def no_network():
        raise ValueError(
            "Kernel repository could not verify publisher trust status. Set trust_remote_code=True to load"
        )

    def wrong():
        module = _hub_module([])
        right = module._ops.ops.selective_scan_bwd
        module._ops.ops.selective_scan_bwd = lambda *arguments: [1.01 * x for x in right(*arguments)]
        return module

    tensors = make_scan(length=3).to(torch.float32).tensors
    for get_kernel, words in (
        (None, "Hugging Face's package kernels is not installed; pip install kernels"),
        (no_network, r"verify publisher trust status\). Its first use needs the network; .* HF_HUB_OFFLINE=1"),
        (lambda: types.SimpleNamespace(), "kernel cannot be loaded .*_ops"),
        (wrong, "kernels-community/mamba-ssm's kernel: of a small plain scan, the gradient of u is wrong by 0.01"),
    ):
        fake_hub(get_kernel)
        with use_backend("hub"), pytest.raises(LightNetsError, match=words) as error:
            selective_scan(*tensors)
        assert "trust_remote_code" not in str(error.value) and "\n" not in str(error.value)


def test_the_hub_without_network_is_refused(fake_hub, make_scan, monkeypatch, tmp_path):
    """With the real package, where it is installed."""
    kernels = pytest.importorskip("kernels")
    hub_constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    fake_hub(None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    with (
        use_backend("hub"),
        pytest.raises(LightNetsError, match=r"not available in the local cache.*needs the network"),
    ):
        selective_scan(*make_scan(length=3).to(torch.float32).tensors)
