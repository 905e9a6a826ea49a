"""The Mamba layer by torch's operations around the operators of the scan and the convolution, on any device.

A run of tokens goes through all steps before the next one starts: on a CPU it stays in the caches, on a GPU it bounds
the memory. The convolution sees the last tokens of the run before, which are projected again for that; the scan goes on
from its last state. The backward pass takes the runs from the last to the first, computes each again, and hands on the
gradients of the state and of the tokens that the convolution saw. The group norm's moments depend on all tokens: what
they add to the gradient of the tokens comes last, as a scale and an offset.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops.causal_conv1d import causal_conv1d
from nnunetv2_lightnets.ops.mamba_layer.record import Gradients, Layer
from nnunetv2_lightnets.ops.selective_scan.dispatch import forced_backend, refusal
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK
from nnunetv2_lightnets.ops.token_moments import block_length, input_gradient, moments, scale_and_shift
from nnunetv2_lightnets.ops.triton_runtime import ceil_div

FROM_ZERO = ("mamba_ssm", "hub")  # backends of the scan that take no initial state


def run_tokens(layer: Layer, device: str = "") -> int:
    """Tokens of a run, of one sequence or of several whole ones; the first projection makes (tokens, 2 D) of them."""
    return block_length(device or layer.tokens.device.type, 2 * layer.channels, layer.history)


class _Run(NamedTuple):
    """Tokens ``start`` to ``stop`` of some sequences: of one only, unless that is all of them."""

    sequences: slice
    start: int
    stop: int

    def of(self, x: Tensor, before: int = 0) -> Tensor:
        """The run's part of ``x`` (B, L, C), and so many tokens before it."""
        return x[self.sequences, self.start - before : self.stop]


def _runs(layer: Layer) -> list[_Run]:
    batch, length, _ = layer.tokens.shape
    step = run_tokens(layer)
    if length <= step:
        together = step // length
        return [_Run(slice(i, min(i + together, batch)), 0, length) for i in range(0, batch, together)]
    if _scans_start_at_zero(layer.tokens.device):
        step = length
    starts = range(0, length, step)
    return [_Run(slice(i, i + 1), start, min(start + step, length)) for i in range(batch) for start in starts]


def saved_numbers(layer: Layer) -> int:
    """How many numbers of states :func:`forward` saves: those before all runs but the first of a sequence.

    What a graph or a planner relies on, so it asks nothing of the machine: see :func:`_scans_start_at_zero`.
    """
    batch, length, _ = layer.tokens.shape
    return batch * (ceil_div(length, run_tokens(layer)) - 1) * layer.A_log.numel()


def fits(layer: Layer, states: Tensor) -> bool:
    """Whether these are the states that :func:`backward` needs, as things are; it may need none."""
    needed = sum(run.start > 0 for run in _runs(layer)) * layer.A_log.numel()
    return needed in (0, states.numel())


def _scans_start_at_zero(device: torch.device) -> bool:
    """Whether mamba-ssm's kernel is what scans there, which takes no initial state: a sequence is one run then."""
    forced = forced_backend()
    return forced in FROM_ZERO if forced else device.type == "cuda" and _without_triton(device)


@cache
def _without_triton(device: torch.device) -> bool:
    return refusal("triton", "plain", device) is not None and refusal("mamba_ssm", "plain", device) is None


class _Prepared:
    """A layer whose parameters have the dtypes that the steps compute in."""

    def __init__(self, layer: Layer, stats: Tensor) -> None:
        product, dtype, scan = layer.product_dtype, layer.dtype, layer.scan_dtype
        self.layer, self.product_dtype, self.dtype, self.scan_dtype = layer, product, dtype, scan
        self.in_weight, self.x_weight, self.dt_weight = (
            weight.to(product) for weight in (layer.in_weight, layer.x_weight, layer.dt_weight)
        )
        self.proj_weight, self.proj_bias = (
            None if x is None else x.to(product) for x in (layer.proj_weight, layer.proj_bias)
        )
        self.out_weight = layer.out_weight.to(dtype)
        self.norm = (
            None
            if layer.norm_weight is None or layer.norm_bias is None
            else (layer.norm_weight.to(dtype), layer.norm_bias.to(dtype))
        )
        self.skip_scale = None if layer.skip_scale is None else layer.skip_scale.to(dtype)
        self.A, self.D, self.dt_bias = -layer.A_log.to(scan).exp(), layer.D.to(scan), layer.dt_bias.to(scan)
        self.split = [layer.dt_weight.shape[1], layer.A_log.shape[1], layer.A_log.shape[1]]
        # Of the group norm, (B, 1, C): scale and shift with its parameters, and without.
        self.group: tuple[Tensor, ...] | None = None
        if layer.group_weight is not None and layer.group_bias is not None:
            mean, rstd = stats.unbind(2)
            weight, bias = layer.group_weight.to(scan), layer.group_bias.to(scan)
            one, zero = torch.ones_like(weight), torch.zeros_like(weight)
            self.group = (*scale_and_shift(mean, rstd, weight, bias), *scale_and_shift(mean, rstd, one, zero))

    def activated(self, run: _Run, before: int) -> Tensor:
        """The run's tokens and so many before it, after group norm and ReLU."""
        tokens = run.of(self.layer.tokens, before)
        if self.group is None:
            return tokens.to(self.dtype)
        scale, shift = (x[run.sequences] for x in self.group[:2])
        return torch.addcmul(shift, tokens, scale).to(self.dtype).relu_()

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``x`` (b, T, C) after the layer norm, for a product; and its mean and reciprocal standard deviation."""
        if self.norm is None:
            return x.to(self.product_dtype), None, None
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *self.norm, self.layer.norm_eps)
        return out.to(self.product_dtype), mean, rstd

    def convolved(self, xi: Tensor) -> Tensor:
        """The causal convolution and SiLU of ``xi`` (b, T, D)."""
        weight, bias = self.layer.conv_weight, self.layer.conv_bias
        return causal_conv1d(xi.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


class _Scan:
    """The scan's arguments and results for a run, in the scan's dtype, (b, D, T) and (b, 1, N, T)."""

    def __init__(self, prepared: _Prepared, u: Tensor, z: Tensor, coefficients: Tensor, state: Tensor | None) -> None:
        dt, b, c = torch.split(coefficients, prepared.split, dim=-1)
        delta = F.linear(dt, prepared.dt_weight)
        u, delta, b, c, z = (x.to(prepared.scan_dtype).transpose(1, 2) for x in (u, delta, b, c, z))
        self.fields = (
            *(u, delta, prepared.A, b.unsqueeze(1), c.unsqueeze(1), prepared.D, z, prepared.dt_bias, state, None),
            True,
        )

    def forward(self, save: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Output (b, T, D), last state (b, D, N), and what :meth:`backward` needs."""
        y, state, *saved = torch.ops.nnunetv2_lightnets.selective_scan(*self.fields, save, False)
        return y.transpose(1, 2), state, tuple(saved)

    def backward(self, grad: Tensor, grad_state: Tensor | None, saved: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Gradients of u, delta, A, B, C, D, z, the bias of delta and the first state."""
        operator = torch.ops.nnunetv2_lightnets.selective_scan_backward
        du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = operator(grad.transpose(1, 2), grad_state, *self.fields, *saved)
        du, ddelta, dB, dC, dz = (x.transpose(-1, -2) for x in (du, ddelta, dB.squeeze(1), dC.squeeze(1), dz))
        return du, ddelta, dA, dB, dC, dD, dz, dbias, dstate


@torch.no_grad()
def forward(layer: Layer, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, Co), states before the runs (flat, empty without ``save``) and moments (B, groups, 2)."""
    stats = layer.new_moments()
    if layer.group_weight is not None:
        torch.stack(moments(layer.tokens, layer.groups, layer.group_eps), 2, out=stats)
    out, prepared = layer.new_output(), _Prepared(layer, stats)
    states: list[Tensor] = []
    state: Tensor | None = None
    for run in _runs(layer):
        if not run.start:
            state = None
        elif save and state is not None:
            states.append(state)
        state = _run_forward(prepared, run, state, run.of(out))
    return out, torch.cat(states).flatten() if states else stats.new_empty(0), stats


def _run_forward(prepared: _Prepared, run: _Run, state: Tensor | None, out: Tensor) -> Tensor:
    """Fill the run's part of the output; return the state after it."""
    layer = prepared.layer
    before = min(run.start, layer.history)
    x = prepared.activated(run, before)
    xi, z = F.linear(prepared.normalised(x)[0], prepared.in_weight).chunk(2, -1)
    u = prepared.convolved(xi)[:, before:]
    scan = _Scan(prepared, u, z[:, before:], F.linear(u, prepared.x_weight), state)
    y, state, _ = scan.forward(save=False)
    del xi, z, u, scan
    if prepared.proj_weight is None or prepared.skip_scale is None:
        _product(y.to(prepared.dtype), prepared.out_weight, None, out)
        return state
    mixed = F.linear(y.to(prepared.dtype), prepared.out_weight).addcmul_(x[:, before:], prepared.skip_scale)
    del y
    _product(prepared.normalised(mixed)[0], prepared.proj_weight, prepared.proj_bias, out)
    return state


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """A linear layer into ``out`` (b, T, C), which is dense."""
    rows = out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=rows)
    else:
        torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t(), out=rows)


class _Sums:
    """Gradients of parameters, summed over runs in float32 at least."""

    def __init__(self, layer: Layer) -> None:
        self.found = {
            name: torch.zeros_like(x, dtype=layer.scan_dtype, memory_format=torch.contiguous_format)
            for name, x in vars(layer).items()
            if isinstance(x, Tensor) and name != "tokens"
        }

    def add(self, **gradients: Tensor | None) -> None:
        """Add to the gradients of these parameters."""
        for name, gradient in gradients.items():
            if gradient is not None:
                self.found[name] += gradient

    def add_product(self, name: str, grad: Tensor, x: Tensor, bias: str = "") -> None:
        """Add the gradient of a linear layer's weight, from those of its output and its input (b, T, C)."""
        rows = grad.reshape(-1, grad.shape[-1])
        self.found[name] += rows.t() @ x.reshape(-1, x.shape[-1])
        if bias:
            self.found[bias] += rows.sum(0, dtype=self.found[bias].dtype)


@torch.no_grad()
def backward(layer: Layer, grad_out: Tensor, states: Tensor, stats: Tensor) -> Gradients:
    """Gradients of :meth:`Layer.tensors`."""
    prepared, sums = _Prepared(layer, stats), _Sums(layer)
    dtokens = torch.empty_like(layer.tokens)
    runs = _runs(layer)
    later: tuple[Tensor, Tensor] | None = None
    left = list(states.view(-1, 1, *layer.A_log.shape).unbind())  # before the runs that do not start a sequence
    group_sums = stats.new_zeros(2, layer.tokens.shape[0], layer.tokens.shape[2])
    for run in reversed(runs):
        state = left.pop() if run.start else None
        later = _run_backward(prepared, run, state, later, run.of(grad_out), sums, run.of(dtokens), group_sums)
    if prepared.group is not None and layer.group_weight is not None:
        mean, rstd = stats.unbind(2)
        sums.add(group_bias=group_sums[0].sum(0), group_weight=group_sums[1].sum(0))
        slope, offset = input_gradient(
            (group_sums[0], group_sums[1]), mean, rstd, layer.group_weight.to(stats.dtype), layer.tokens.shape[1]
        )
        for run in runs:
            more = torch.addcmul(offset[run.sequences], run.of(layer.tokens), slope[run.sequences])
            run.of(dtokens).add_(more)
    return layer.gradients({"tokens": dtokens, **sums.found})


def _run_backward(
    prepared: _Prepared,
    run: _Run,
    state: Tensor | None,
    later: tuple[Tensor, Tensor] | None,
    grad: Tensor,
    sums: _Sums,
    dtokens: Tensor,
    group_sums: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Compute a run again, and its gradients.

    Args:
        prepared: the layer.
        run: of its tokens.
        state: before the run, (1, D, N); None for zero.
        later: gradients of the state after the run, (1, D, N), and of the convolution's input at its last tokens,
            (1, history, D), from the run after it; None where the sequence ends.
        grad: of the output, (b, T, Co).
        sums: of the parameters' gradients, to be added to.
        dtokens: to be filled, (b, T, C), but for what the moments of the group norm add.
        group_sums: of the group norm's gradient, and of that times normalised tokens, (2, B, C), to be added to.

    Returns:
        What is ``later`` to the run before.
    """
    layer = prepared.layer
    before = min(run.start, layer.history)
    dtype, product, scan_dtype = prepared.dtype, prepared.product_dtype, prepared.scan_dtype

    # Forwards, as far as the scan's output.
    x = prepared.activated(run, before)
    n, mean, rstd = prepared.normalised(x)
    xi, z = F.linear(n, prepared.in_weight).chunk(2, -1)
    u = prepared.convolved(xi)[:, before:]
    coefficients = F.linear(u, prepared.x_weight)
    scan = _Scan(prepared, u, z[:, before:], coefficients, state)
    y, _, saved = scan.forward(save=True)
    xi, x, n = xi.transpose(1, 2), x[:, before:], n[:, before:]
    if mean is not None and rstd is not None:
        mean, rstd = mean[:, before:], rstd[:, before:]

    # From the output to the scan.
    y = y.to(dtype)
    dx: Tensor | None = None
    if prepared.proj_weight is None or prepared.skip_scale is None:
        dm = grad.to(dtype)
    else:
        mixed = F.linear(y, prepared.out_weight).addcmul_(x, prepared.skip_scale)
        normalised, mixed_mean, mixed_rstd = prepared.normalised(mixed)
        grad = grad.to(product)
        sums.add_product("proj_weight", grad, normalised, "proj_bias" if layer.proj_bias is not None else "")
        del normalised
        dm = _norm_backward(prepared, grad @ prepared.proj_weight, mixed, mixed_mean, mixed_rstd, sums)
        del mixed
        sums.add(skip_scale=(dm * x).sum(dtype=scan_dtype))
        dx = dm * prepared.skip_scale
    sums.add_product("out_weight", dm, y)
    dy = (dm @ prepared.out_weight).to(scan_dtype)
    del dm, y

    # Through the scan.
    du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = scan.backward(dy, None if later is None else later[0], saved)
    del dy, scan, saved
    sums.add(A_log=dA * prepared.A, D=dD, dt_bias=dbias)
    ddelta = ddelta.to(product)
    sums.add_product("dt_weight", ddelta, coefficients[..., : prepared.split[0]])
    dcoefficients = torch.cat((ddelta @ prepared.dt_weight, dB.to(product), dC.to(product)), -1)
    del ddelta, coefficients
    sums.add_product("x_weight", dcoefficients, u)
    dconvolved = torch.empty_like(xi).transpose(1, 2)  # (b, before + T, D): this run gives nothing to what is before it
    dconvolved[:, :before] = 0
    torch.add(du, dcoefficients @ prepared.x_weight, out=dconvolved[:, before:])
    del du, dcoefficients, u

    # Through the convolution, to the first projection.
    operator = torch.ops.nnunetv2_lightnets.causal_conv1d_backward
    dxi, dweight, dbias = operator(dconvolved.transpose(1, 2), xi, layer.conv_weight, layer.conv_bias, True)
    sums.add(conv_weight=dweight, conv_bias=dbias)
    del dconvolved, xi
    dxi = dxi.transpose(1, 2)
    if later is not None:
        dxi[:, dxi.shape[1] - layer.history :] += later[1]
    earlier = dxi[:, :before].clone()
    dxi, dz = dxi[:, before:], dz.to(product)
    x_part, z_part = prepared.in_weight.chunk(2)
    sums.add(in_weight=torch.cat([part.flatten(0, 1).t() @ n.flatten(0, 1) for part in (dxi, dz)]))
    dn = (dxi @ x_part).add_(dz @ z_part)
    del dz, n
    dn = _norm_backward(prepared, dn, x, mean, rstd, sums)
    dx = dn if dx is None else dx.add_(dn)
    del dn

    # Through ReLU and the group norm.
    if prepared.group is None:
        dtokens.copy_(dx)
    else:
        dx = torch.ops.aten.threshold_backward(dx, x, 0)
        scale, _, rstd, shift = (part[run.sequences] for part in prepared.group)
        group_sums[0, run.sequences] += dx.sum(1, dtype=scan_dtype)
        group_sums[1, run.sequences] += torch.addcmul(shift, run.of(layer.tokens), rstd).mul_(dx).sum(1)
        torch.mul(dx, scale, out=dtokens)
    return (dstate, earlier) if run.start else None


def _norm_backward(
    prepared: _Prepared, grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, sums: _Sums
) -> Tensor:
    """The gradient of ``x``, from that of its layer norm."""
    grad = grad.to(prepared.dtype)
    if prepared.norm is None or mean is None or rstd is None:
        return grad
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, *prepared.norm, [True, True, True]
    )
    sums.add(norm_weight=dweight, norm_bias=dbias)
    return dx  # type: ignore[no-any-return]


def workspace(layer: Layer, backwards: bool, device: str = "") -> int:
    """Bytes that a pass allocates beside its results: what a run holds while it is scanned, forwards or backwards.

    Args:
        layer: its tensors may have no memory.
        backwards: which pass.
        device: the type of the device that is meant, if it is not that of the tensors. What kernels of the scan take
            inside comes on top.
    """
    batch, length, width = layer.tokens.shape
    channels, states = layer.A_log.shape
    product, dtype, scan = (x.itemsize for x in (layer.product_dtype, layer.dtype, layer.scan_dtype))
    tokens = width * dtype if layer.group_weight is not None or layer.tokens.dtype != layer.dtype else 0
    steps = 3 * channels * product  # xi, z, u
    steps += (3 * channels + 2 * states) * scan if product != scan else channels * scan  # what the scan reads beside
    if backwards or product == scan:
        steps += layer.x_weight.shape[0] * product  # coefficients
    steps += channels * scan  # y, or its gradient
    if backwards:
        steps += width * product if layer.norm_weight is not None or product != dtype else 0  # normalised tokens
        steps += channels * states // CHUNK * scan  # states before chunks
        steps += width * dtype if layer.proj_weight is not None else 0  # what the residual gives to their gradient
        steps += (3 * channels + 2 * states) * scan  # gradients of u, delta, z, B and C
    return min(run_tokens(layer, device), batch * length) * (tokens + steps)
