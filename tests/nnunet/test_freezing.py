"""A frozen part does not move, the rest trains as if nothing else were there, and nothing notices the switch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets.networks.swin_umamba import SwinUMamba
from nnunetv2_lightnets.networks.swin_umamba_d import SwinUMambaD
from nnunetv2_lightnets.nnunet.freezing import backward
from two_processes import run_in_two_processes

FROZEN_EPOCHS, EPOCHS = 2, 4


def swin_umamba(network_class: type[SwinUMamba | SwinUMambaD] = SwinUMamba) -> nn.Module:
    """The real network, small; something that trains (the stem, the patch embedding) comes before the frozen part."""
    features = (8, 16, 32) if network_class is SwinUMamba else (16, 32)
    return network_class(
        spatial_dims=2, input_channels=1, num_classes=2, deep_supervision=True, features=features, depths=(1, 1)
    )


class Plain(nn.Module):
    """Three convolutions, the middle one frozen at first: compiled in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            x = layer(x).tanh()
            outputs.append(x)
        return outputs[::-1]

    def frozen_parameters(self) -> list[str]:
        return ["layers.1.weight", "layers.1.bias"]


def frozen_of(network: nn.Module) -> list[nn.Parameter]:
    return [network.get_parameter(name) for name in network.frozen_parameters()]  # type: ignore[operator]


def loss_of(network: nn.Module, seed: int, coarsest: float = 0.0) -> Tensor:
    """The coarsest output does not count, as in nnU-Net, so that one head has no gradient at all."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # stochastic depth
    outputs = network(torch.randn(2, 1, 32, 32, generator=generator))
    losses = [output.square().mean() for output in outputs]
    return sum(losses[:-1]) + (coarsest * losses[-1] if coarsest else 0.0)  # type: ignore[return-value]


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: range,
    *,
    run: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    after_epoch: Callable[[int, float], None] = lambda epoch, norm: None,
    rank: int = 0,
    coarsest: float = 0.0,
) -> None:
    """One iteration per epoch, step by step as the trainers do it; ``run`` is the network in its wrapper."""
    run = network if run is None else run
    for epoch in epochs:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(run, 10 * epoch + rank, coarsest)
        backward(scaler.scale(loss) if scaler else loss, run, frozen_of(network) if epoch < FROZEN_EPOCHS else ())
        if scaler:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.parameters(), 0.1)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        after_epoch(epoch, float(norm))


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.5, eps=1e-5)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=0.5)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("network_class", [SwinUMamba, SwinUMambaD])
def test_gradients_of_the_rest_are_the_same_bit_by_bit(network_class: type[SwinUMamba | SwinUMambaD]) -> None:
    network = swin_umamba(network_class)
    loss_of(network, 1).backward()
    full = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    backward(loss_of(network, 1), network, frozen_of(network))
    frozen = set(network.frozen_parameters())  # type: ignore[operator]
    assert any(name.startswith("vssm_encoder.patch_embed") for name in set(full) - frozen)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad
        if name in frozen or full[name] is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, full[name]), name


def test_gradients_of_frozen_weights_are_not_even_computed() -> None:
    """Two of three layers frozen, the first trains: the three products for the weights become one."""
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    product = 2 * 4 * 8 * 8  # FLOPs of (4, 8) times (8, 8)

    def cost(frozen: list[nn.Parameter]) -> int:
        loss = layers(torch.randn(4, 8)).sum()
        with FlopCounterMode(display=False) as counter:
            backward(loss, layers, frozen)
        return int(counter.get_total_flops())

    assert cost([]) == 5 * product  # three for weights, two for activations
    assert cost([layers[1].weight, layers[2].weight]) == 3 * product


@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
def test_the_frozen_part_stands_still_and_then_moves(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    """Neither weight decay nor momentum moves it."""
    network = swin_umamba()
    frozen, before = set(network.frozen_parameters()), values(network)  # type: ignore[operator]

    def check(epoch: int, _: float) -> None:
        now = moved(before, values(network))
        if epoch < FROZEN_EPOCHS:
            assert not now & frozen
        else:
            assert frozen <= now
        assert {"stem.0.weight", "vssm_encoder.patch_embed.proj.weight", "decoder.seg_layers.0.weight"} <= now

    train(network, optimizer_of(network), range(EPOCHS), after_epoch=check)


def test_the_clipped_norm_is_of_what_is_trained() -> None:
    """Gradients of length 3 and 4 would be 5 together; frozen, one does not count."""
    network = nn.ParameterDict({"frozen": nn.Parameter(torch.ones(1)), "trained": nn.Parameter(torch.ones(1))})
    backward(4 * network["frozen"] + 3 * network["trained"], network, [network["frozen"]])
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.5)
    assert float(norm) == 3.0
    assert float(network["trained"].grad) == pytest.approx(1.5)


def test_with_a_gradient_scaler_it_is_the_same_training() -> None:
    """The scale, a power of two, does not touch a single bit."""
    plain = swin_umamba()
    scaled = copy.deepcopy(plain)
    train(plain, adamw(plain), range(EPOCHS))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
    train(scaled, adamw(scaled), range(EPOCHS), scaler=scaler)
    assert scaler.get_scale() == 2.0 ** (12 + EPOCHS)  # it was at work
    assert not moved(values(plain), values(scaled))


def test_an_overflow_in_the_frozen_part_skips_no_step() -> None:
    """Only what is trained decides whether the scaler steps."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return x * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return grad, torch.full((), torch.inf)

    network = nn.Linear(2, 1)
    network.gain = nn.Parameter(torch.ones(()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer, before = sgd(network), values(network)
    loss = Overflow.apply(nn.functional.linear(torch.ones(1, 2), network.weight, network.bias), network.gain).sum()
    backward(scaler.scale(loss), network, [network.gain])  # type: ignore[list-item]
    scaler.step(optimizer)
    scaler.update()
    assert moved(before, values(network)) == {"weight", "bias"} and scaler.get_scale() == 4.0


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    """Gradients as the compiled network has them without freezing, then a training."""
    network = swin_umamba()
    frozen = set(network.frozen_parameters())  # type: ignore[operator]
    run = torch.compile(network, backend="aot_eager")
    loss_of(run, 1).backward()
    full = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    backward(loss_of(run, 1), run, frozen_of(network))
    for name, parameter in network.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        elif full[name] is not None:
            assert torch.equal(parameter.grad, full[name]), name

    before = values(network)

    def check(epoch: int, _: float) -> None:
        assert (epoch < FROZEN_EPOCHS) == (not moved(before, values(network)) & frozen)

    train(network, adamw(network), range(EPOCHS), run=run, after_epoch=check)


@pytest.mark.parametrize("stop", range(1, EPOCHS))
def test_resumed_before_at_and_after_the_switch(stop: int) -> None:
    whole = swin_umamba()
    resumed = copy.deepcopy(whole)
    train(whole, adamw(whole), range(EPOCHS))

    optimizer = adamw(resumed)
    train(resumed, optimizer, range(stop))
    saved = copy.deepcopy((resumed.state_dict(), optimizer.state_dict()))
    torch.manual_seed(99)
    resumed = swin_umamba()
    optimizer = adamw(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, range(stop, EPOCHS))
    assert not moved(values(whole), values(resumed))


# --- two processes --------------------------------------------------------------------------------------------------


def one_of_two_processes(rank: int, folder: Path) -> None:
    """Train on other data than the other process does, and save the weights after each epoch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for kind in ("plain", "compiled"):
        torch.manual_seed(rank)  # DistributedDataParallel hands out the first process' weights
        network = Plain() if kind == "compiled" else swin_umamba()
        # As nnU-Net does it: DistributedDataParallel outside, and uncompiled a tiny weight for the coarsest head, so
        # that all parameters have gradients to exchange.
        run = nn.parallel.DistributedDataParallel(
            torch.compile(network, backend="aot_eager") if kind == "compiled" else network  # type: ignore[arg-type]
        )
        history = [values(network)]

        def keep(_: int, __: float, network: nn.Module = network, history: list[Any] = history) -> None:
            history.append(values(network))

        coarsest = 0.0 if kind == "compiled" else 1e-6
        train(network, adamw(network), range(EPOCHS), run=run, rank=rank, coarsest=coarsest, after_epoch=keep)
        torch.save((history, list(network.frozen_parameters())), folder / f"{kind}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two processes")
    run_in_two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_two_processes_end_equal(kind: str, two_processes: Path) -> None:
    (first, names), (second, _) = (torch.load(two_processes / f"{kind}{rank}.pt") for rank in range(2))
    for epoch, (one, other) in enumerate(zip(first, second, strict=True)):
        assert not moved(one, other), epoch  # bit by bit
    frozen = set(names)
    for epoch in range(EPOCHS):
        now = moved(first[epoch], first[epoch + 1])
        assert bool(now - frozen)
        assert (now & frozen == set()) if epoch < FROZEN_EPOCHS else (frozen <= now)


if __name__ == "__main__":
    one_of_two_processes(int(sys.argv[2]), Path(sys.argv[1]))
