"""What holds for a selective scan whatever computes it."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_lightnets.ops import available_backends, causal_conv1d, selective_scan, use_backend
from nnunetv2_lightnets.ops.selective_scan import chunked
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from tests.ops.operator_call import operator_arguments

BACKENDS = [name for name, reason in available_backends().items() if reason is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def _tokens(scan, part):
    """The arguments of a scan with only some of its tokens."""
    u, delta, A, B, C, D, z, bias = scan.tensors
    return u[..., part], delta[..., part], A, B[..., part], C[..., part], D, z[..., part], bias, scan.delta_softplus


def test_causality(backend, make_scan):
    """A token changes nothing before it, and something at it."""
    scan = make_scan(length=150)
    before = selective_scan(*scan.tensors, True)
    for index in (0, 1, 3, 4):  # u, delta, B, C
        changed = list(scan.tensors)
        changed[index] = changed[index].clone()
        changed[index][..., 100:] += 1
        after = selective_scan(*changed, True)
        assert torch.equal(after[..., :100], before[..., :100])
        assert (after[..., 100] != before[..., 100]).any()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_a_prefix_scans_as_in_the_whole(backend, length, make_scan):
    scan = make_scan(length=200)
    whole = selective_scan(*scan.tensors, True)
    part = selective_scan(*_tokens(scan, slice(length)))
    torch.testing.assert_close(part, whole[..., :length], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_the_last_state_continues_a_sequence(backend, cut, make_scan):
    """Two parts, of which the second starts from the first one's last state, make the whole."""
    scan = make_scan(length=170, groups=2)
    _, _, A, _, C, _, z, bias = scan.tensors
    whole, whole_state = selective_scan(*scan.tensors, True, return_last_state=True)
    _, state = selective_scan(*_tokens(scan, slice(cut)), return_last_state=True)
    rest, rest_state = selective_scan(*_tokens(scan, slice(cut, None)), return_last_state=True)
    steps = F.softplus(scan.tensors[1] + bias[:, None])[..., cut:].cumsum(-1)  # (B, D, L - cut)
    carried = torch.exp(steps.unsqueeze(-1) * A[:, None]) * state.unsqueeze(2)  # (B, D, L - cut, N)
    C = C[..., cut:].repeat_interleave(3, dim=1)  # (B, D, N, L - cut)
    rest = rest + torch.einsum("bdln,bdnl->bdl", carried, C) * F.silu(z[..., cut:])
    torch.testing.assert_close(rest, whole[..., cut:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rest_state + carried[:, :, -1], whole_state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100, 128, 169])
@pytest.mark.parametrize("options", [{"layout": "channels-last"}, {"z": False, "groups": 2, "initial": True}])
def test_a_sequence_in_two_parts(backend, cut, options, make_scan, assert_close):
    """Outputs, last state and all gradients are those of the whole, wherever it is cut."""
    scan = make_scan(length=170, **options)
    results = []
    for cuts in ([slice(None)], [slice(cut), slice(cut, None)]):
        leaves = [None if x is None else x.detach().requires_grad_() for x in (*scan.tensors, scan.initial_state)]
        whole = replace(scan, tensors=tuple(leaves[:-1]))
        outputs, state = [], leaves[-1]
        for tokens in cuts:
            part = whole.part(tokens, state)
            out, state = selective_scan(*part.tensors, True, True, part.initial_state)
            outputs.append(out)
        out = torch.cat(outputs, -1)
        given = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad(out.sin().sum() + state.cos().sum(), given)
        results.append({str(i): x.detach() for i, x in enumerate((out, state, *gradients))})
    assert_close(results[1], results[0], 1e-11)


@pytest.mark.parametrize("cut", [1, 64, 99])
def test_directions_in_two_parts(backend, cut, assert_close):
    """The operator takes the states of all directions, too: tokens before and after a cut of each direction's path."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(130, generator=generator) for _ in range(3)]).int()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [normal(2, 4, 130), normal(2, 3, 4, 130), -normal(3, 4, 2).exp(), normal(2, 3, 2, 130)]
    tensors += [normal(2, 3, 2, 130), normal(3, 4)]
    # In the second part, the tokens of the first take no step, and give no output; and the other way round.
    first = torch.zeros(3, 130, dtype=torch.bool).scatter_(1, order[:, :cut].long(), True)[:, None]
    results = []
    for masks in ([torch.ones_like(first)], [first, ~first]):
        u, delta, A, B, C, bias = (x.detach().requires_grad_() for x in tensors)
        initial_state = torch.ones(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
        steps = torch.nn.functional.softplus(delta + bias[..., None])
        out, state = 0, initial_state
        for mask in masks:
            scan = Scan(u, steps * mask, A, B, C * mask, None, None, None, state, order)
            y, state, *_ = torch.ops.nnunetv2_lightnets.selective_scan(*operator_arguments(scan), True, False)
            out = out + y
        leaves = [u, delta, A, B, C, bias, initial_state]
        gradients = torch.autograd.grad(out.sin().sum() + state.cos().sum(), leaves)
        results.append({str(i): x.detach() for i, x in enumerate((out, state, *gradients))})
    assert_close(results[1], results[0], 1e-11)


def test_batch_items_are_independent(backend, make_scan):
    scan = make_scan(batch=3, length=70)
    u, delta, A, B, C, D, z, bias = scan.tensors
    whole = selective_scan(*scan.tensors, True)
    for item in range(3):
        i = slice(item, item + 1)
        alone = selective_scan(u[i], delta[i], A, B[i], C[i], D, z[i], bias, True)
        torch.testing.assert_close(alone, whole[i], rtol=1e-12, atol=1e-13)


def test_channels_are_independent(backend, make_scan):
    scan = make_scan(channels=6, groups=2, length=70)
    u, delta, A, B, C, D, z, bias = scan.tensors
    whole = selective_scan(*scan.tensors, True)
    for d in range(6):
        i, g = slice(d, d + 1), slice(d // 3, d // 3 + 1)
        alone = selective_scan(u[:, i], delta[:, i], A[i], B[:, g], C[:, g], D[i], z[:, i], bias[i], True)
        torch.testing.assert_close(alone, whole[:, i], rtol=1e-12, atol=1e-13)


def test_linearity_in_u(backend, make_scan):
    one, two = make_scan(length=130, seed=1), make_scan(length=130, seed=2)
    rest = one.tensors[1:]
    together = selective_scan(2 * one.tensors[0] - 3 * two.tensors[0], *rest, True)
    apart = 2 * selective_scan(one.tensors[0], *rest, True) - 3 * selective_scan(two.tensors[0], *rest, True)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-11)


def test_results_do_not_depend_on_the_memory_layout(backend, make_scan):
    scan = make_scan(length=90)
    plain = selective_scan(*scan.tensors, True)
    transposed = [x.mT.contiguous().mT if x is not None and x.dim() > 2 else x for x in scan.tensors]
    torch.testing.assert_close(selective_scan(*transposed, True), plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_inputs_stay_finite(backend, dtype, make_scan):
    """|delta| up to 50, |u| up to 10,000, decays from almost none to almost all: finite, and so are the gradients."""
    generator = torch.Generator().manual_seed(0)
    u, delta, A, B, C, D, z, bias = make_scan(length=200, state=4).to(dtype).tensors
    u = 2e4 * (torch.rand(u.shape, generator=generator) - 0.5).to(dtype)
    delta = 100 * (torch.rand(u.shape, generator=generator) - 0.5).to(dtype)
    A = -torch.tensor([1e-4, 1e-1, 10, 1e3]).expand(A.shape)
    leaves = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]
    out, last_state = selective_scan(*leaves, True, return_last_state=True)
    assert out.isfinite().all() and last_state.isfinite().all()
    for grad in torch.autograd.grad(out.float().sum(), leaves):
        assert grad.isfinite().all()


def test_float16_inputs_pass_through_states_beyond_its_range(backend, make_scan):
    """A state of 800,000 does not fit float16, but the output does, and is right."""
    u = torch.full((1, 4, 70), 1e4, dtype=torch.float16)
    delta = torch.ones_like(u)
    A = torch.full((4, 2), -0.01)
    B = torch.full((1, 2, 70), 2.0, dtype=torch.float16)
    C = torch.full((1, 2, 70), 1e-2, dtype=torch.float16)
    out, last_state = selective_scan(u, delta, A, B, C, return_last_state=True)
    decay = torch.exp(torch.tensor(-0.01, dtype=torch.float64))
    expected = 2e4 * (1 - decay ** torch.arange(1, 71)) / (1 - decay)
    assert last_state.max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(last_state.double(), expected[-1].expand(1, 4, 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), (2 * C[0, 0, 0].double() * expected).expand(1, 4, 70), rtol=1e-3, atol=0)


def test_long_memory_keeps_its_precision(backend, make_scan):
    """Decays next to 1 over many tokens: errors must not add up."""
    length = 4096 if backend != "reference" else 1024
    scan = make_scan(batch=1, channels=4, length=length, state=4, z=False, bias=False)
    u, delta, A, *rest = scan.tensors
    single = [x if x is None else x.float() for x in (u, delta - 4, 0.02 * A, *rest)]
    double = [x if x is None else x.double() for x in single]
    with use_backend("torch"):
        expected = selective_scan(*double, True)
    error = (selective_scan(*single, True) - expected).abs().max() / expected.abs().max()
    assert error < 2e-6


def test_threads_get_what_one_thread_gets(make_scan):
    """Two threads scan at once, each with its own forced backend."""
    scans = [make_scan(length=300, channels=8, seed=seed) for seed in range(8)]
    names = [BACKENDS[i % len(BACKENDS)] for i in range(8)]
    alone = [scan.run(name) for scan, name in zip(scans, names, strict=True)]
    barrier = threading.Barrier(2)

    def work(first):
        torch.set_num_threads(1)
        barrier.wait()
        return [scans[i].run(names[i]) for i in range(first, 8, 2)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, (0, 1)))
    for i in range(8):
        for name, wanted in alone[i].items():
            assert torch.equal(together[i % 2][i // 2][name], wanted)


def _scan_in_child(tensors, backend, queue):
    torch.set_num_threads(1)  # as torch's own data loaders do: OpenMP's threads do not survive a fork
    with use_backend(backend):
        queue.put(selective_scan(*tensors, True).sum().item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_can_scan(backend, make_scan):
    tensors = make_scan(channels=16, length=300).tensors
    torch.set_num_threads(2)
    expected = selective_scan(*tensors, True).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_scan_in_child, args=(tensors, backend, queue))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert queue.get() == pytest.approx(expected, rel=1e-12)


class _LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_torch_backend_never_holds_all_states(make_scan):
    """Its largest tensor is an input or one block's states, not (B, D, L, N), forwards and backwards."""
    scan = make_scan(batch=1, channels=32, length=8192, state=16).to(torch.float32)
    with _LargestTensor() as forward:
        states = chunked.forward(scan.record(), True)[2]
    with _LargestTensor() as backward:
        chunked.backward(scan.record(), (torch.ones(1, 32, 8192), None), states)
    block = 64 * chunked.WIDTH["cpu"]
    assert max(forward.elements, backward.elements) <= max(block, 32 * 8192) < 32 * 8192 * 16


def test_convolution_and_scan_of_a_mamba_block(golden):
    """The published Mamba block, computed with the operators: projections are plain matrix products."""
    case = golden("mamba_block")
    state = {name.removeprefix("mamba."): x for name, x in case.state.items()}
    x, z = (case.ordered("input", "a")[0] @ state["in_proj.weight"].mT).chunk(2, dim=-1)  # (B, L, D) each
    u = causal_conv1d(x.mT, state["conv1d.weight"].squeeze(1), state["conv1d.bias"], "silu").mT
    dt, B, C = (u @ state["x_proj.weight"].mT).split([2, 16, 16], dim=-1)
    delta = dt @ state["dt_proj.weight"].mT
    A = -torch.exp(state["A_log"])
    y = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, state["D"], z.mT, state["dt_proj.bias"], True)
    out = y.mT @ state["out_proj.weight"].mT
    torch.testing.assert_close(out, case.ordered("output", "a")[0], rtol=1e-5, atol=case.manifest["atol"])
