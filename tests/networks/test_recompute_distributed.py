"""Networks that compute again in the backward pass, trained by two real processes: gradients are those of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets import create_network
from two_processes import run_in_two_processes

pytestmark = pytest.mark.slow
NETWORKS = {  # name: dimensions, keywords
    "lightm_unet": (3, {"width": 8}),
    "ulite": (3, {}),
    "ultralight_unet": (3, {"variant": "T"}),
    "swin_umamba_d": (2, {"drop_path_rate": 0.0, "deep_supervision": True}),
    "umamba_bot": (3, {"patch_size": (16, 16, 16), "features": (8, 16)}),
}


def samples(dims: int) -> list[tuple[Tensor, Tensor]]:
    """What each process trains on: two patches and their labels."""
    generator, patch = torch.Generator().manual_seed(0), {2: (64, 64), 3: (16, 16, 16)}[dims]
    return [
        (
            torch.randn(2, 1, *patch, generator=generator, dtype=torch.float64),
            torch.randint(3, (2, *patch), generator=generator),
        )
        for _ in range(2)
    ]


def build(name: str) -> nn.Module:
    dims, keywords = NETWORKS[name]
    torch.manual_seed(1)
    network = create_network(name, spatial_dims=dims, input_channels=1, num_classes=3, **keywords)
    return network.double()  # batch norms of the few voxels at the bottom make much of a rounding error


def loss(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Of all heads, so that all parameters have gradients to exchange."""
    logits = network(x)
    heads = [logits] if isinstance(logits, Tensor) else logits
    targets = (F.interpolate(target[:, None].float(), head.shape[2:])[:, 0].long() for head in heads)
    losses = [F.cross_entropy(*pair) for pair in zip(heads, targets, strict=True)]
    return torch.stack(losses).sum()


def one_of_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for name, (dims, _) in NETWORKS.items():
        network = build(name)
        run = nn.parallel.DistributedDataParallel(network)
        loss(run, *samples(dims)[rank]).backward()
        torch.save({key: p.grad for key, p in network.named_parameters()}, folder / f"{name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two processes")
    run_in_two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_mean_of_both_processes(name: str, two_processes: Path) -> None:
    expected: dict[str, Tensor] = {}
    for x, target in samples(NETWORKS[name][0]):
        network = build(name)
        loss(network, x, target).backward()
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, key
            expected[key] = expected.get(key, torch.zeros_like(parameter)) + parameter.grad / 2
    largest = max(grad.abs().max().item() for grad in expected.values())
    for rank in range(2):
        found = torch.load(two_processes / f"{name}{rank}.pt")
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, key=key: key + m)


if __name__ == "__main__":
    one_of_two_processes(int(sys.argv[2]), Path(sys.argv[1]))
