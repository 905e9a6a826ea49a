"""Bytes under the mixed precision of a GPU, counted without one: against torch's own rules for CUDA, on fake tensors.

torch applies these rules to fake tensors "on" CUDA in a forward pass, without a GPU; it refuses their backward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.nnunet.memory import training_memory
from nnunetv2_lightnets.nnunet.mixed_precision import cuda_autocast
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.ops.selective_scan import workspace
from nnunetv2_lightnets.ops.selective_scan.record import n_chunks
from nnunetv2_lightnets.trainers import find_trainer

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA has no such tensors")
CUDA = torch.device("cuda")


@contextlib.contextmanager
def cudas_own() -> Iterator[None]:
    """What ``torch.autocast("cuda")`` switches on where there is a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


Context = Callable[[], AbstractContextManager[Any]]
WAYS: list[tuple[str, Context]] = [("cuda", cudas_own), ("cpu", cuda_autocast)]


def saved_bytes(name: str, patch: tuple[int, ...], device: str, context: Context) -> int:
    """Bytes that a forward pass of two patches saves for the backward pass."""
    with torch.device("meta"):
        network = create_network(name, spatial_dims=len(patch), input_channels=1, num_classes=3)
    sizes: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes(), storage
        return tensor

    with FakeTensorMode():
        network._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))
        x = torch.empty(2, 1, *patch, device=device)
        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            answer = network(x)
            answer = answer[0] if isinstance(answer, (list, tuple)) else answer
            assert answer.dtype == torch.float16
            F.cross_entropy(answer, torch.zeros(2, *patch, dtype=torch.long, device=device))
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize(
    "name",
    [
        "lightm_unet",
        "ulite",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ultralight_unet", "swin_umamba", "swin_umamba_d")),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("umamba_bot", "umamba_enc", "segresnet", "swin_unetr")),
    ],
)
def test_a_network_saves_what_it_would_on_a_gpu(name: str) -> None:
    real, counted = (saved_bytes(name, (64, 64), *way) for way in WAYS)
    assert abs(counted - real) <= allowed(real, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightm_unet", "ulite", "ultralight_unet", "umamba_bot", "segresnet"])
def test_a_volume_saves_what_it_would_on_a_gpu(name: str) -> None:
    real, counted = (saved_bytes(name, (32, 32, 32), *way) for way in WAYS)
    assert abs(counted - real) <= allowed(real, (32, 32, 32))


def allowed(real: float, patch: tuple[int, ...]) -> float:
    """Bytes: 1.5 %, or the logits in half precision, of which CUDA's loss keeps one more, and some norm's moments."""
    return max(0.015 * real, 2 * 3 * math.prod(patch) * 2 + 4096)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm,
    "softmax": lambda x: x.softmax(1),
    "exp": torch.exp,
    "sum": lambda x: x.sum((0, 2)),
    "pow": lambda x: x**3,
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 1),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "max_pool3d_with_indices": lambda x: torch.ops.aten.max_pool3d_with_indices(x, [2, 2, 2])[0],
    "conv3d": lambda x: F.conv3d(x, torch.empty(3, 4, 1, 1, 1, device=x.device)),
    "linear": lambda x: F.linear(x, torch.empty(3, 8, device=x.device)),
    "matmul": lambda x: x @ x,
    "prelu": lambda x: F.prelu(x, torch.empty(1, device=x.device)),
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "add": lambda x: x + x.float(),
    "cat": lambda x: torch.cat([x, x.float()]),
    "einsum": lambda x: torch.einsum("bcdhw,bcdhw->bc", x, x),
    "mse_loss": lambda x: F.mse_loss(x, x),
    "nested": lambda x: torch.utils.checkpoint.checkpoint(F.gelu, x, use_reentrant=False),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_answer_in_the_same_dtype(name: str, dtype: torch.dtype) -> None:
    found = []
    with FakeTensorMode():
        for device, context in WAYS:
            x = torch.empty(2, 4, 8, 8, 8, dtype=dtype, device=device)
            with context():
                found.append(FUNCTIONS[name](x).dtype)
    assert found[0] == found[1]


def test_code_that_switches_it_off_is_in_full_precision() -> None:
    with FakeTensorMode(), cuda_autocast(), torch.autocast("cpu", enabled=False):
        half = torch.empty(2, 8, dtype=torch.float16)
        assert F.layer_norm(half, (8,)).dtype == torch.float16
        assert F.linear(half.float(), torch.empty(3, 8)).dtype == torch.float32


def test_activations_take_half_of_it_and_weights_do_not() -> None:
    trainer, setting = find_trainer("nnUNetTrainerULite"), patch_setting((128, 128), 1, 3)
    assert trainer is not None
    full, mixed = (training_memory(trainer, setting, 4, torch.device(device)) for device in ("cpu", "cuda"))
    assert mixed.fixed == full.fixed and 0.4 < mixed.saved / full.saved < 0.75


def test_nnunets_own_network_is_counted_too() -> None:
    """It has modules that it registers twice."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    setting = patch_setting((320, 320), 1, 3)  # activations are more than the halved weights
    full, mixed = (training_memory(nnUNetTrainer, setting, 2, torch.device(device)) for device in ("cpu", "cuda"))
    assert mixed.fixed == full.fixed and 0.4 < mixed.saved / full.saved < 0.75


@pytest.mark.parametrize("directions", [0, 4])
def test_workspace_of_the_scan(directions: int) -> None:
    """Segments are whole chunks, so their states are never more than those that are saved for the chunks."""
    batch, channels, states, length = 1, 64, 16, 64 * 64 * 64
    paths = (directions,) if directions else ()
    u = torch.empty(batch, channels, length, device="meta")
    delta = torch.empty(batch, *paths, channels, length, device="meta")
    A = torch.empty(*paths, channels, states, device="meta")
    B = torch.empty(batch, directions or 1, states, length, device="meta")
    order = torch.empty(directions, length, dtype=torch.int32, device="meta") if directions else None
    scan = (u, delta, A, B, B, None, None, None, None, order, True)
    copies = directions * u.numel() * 4
    saved = batch * (directions or 1) * n_chunks(length) * channels * states * 4
    assert copies < workspace.forward(*scan, True, False) <= copies + 3 * saved
    backward = workspace.backward(u, None, *scan, torch.empty(0), torch.empty(0))
    assert copies + 2 * B.numel() * 4 < backward < copies + 2 * 16 * B.numel() * 4 + 8 * saved


@pytest.mark.parametrize(
    "network",
    ["LightMUNetT", "UMambaBot", pytest.param("SwinUMambaDScratch", marks=pytest.mark.slow), "LightMUNetTNoScan"],
)
def test_a_step_that_is_computed_again_is_counted(network: str) -> None:
    """Recomputation in the backward pass follows the same rules, and operators take there what they take on a GPU."""
    trainer = find_trainer(f"nnUNetTrainer{network}")
    assert trainer is not None
    counted = training_memory(trainer, patch_setting([64, 64], 1, 3), 2, CUDA)
    assert 0 < counted.saved < counted.step
