"""Networks that recompute train as their plain forms do, written down here step by step, and keep little."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks.base import as_trained
from torch import Tensor, nn

from nnunetv2_lightnets.networks import create_network, layers, recompute
from nnunetv2_lightnets.networks.layers import BatchNorm
from nnunetv2_lightnets.networks.lightm_unet import Decoder, ResidualConvBlock, TokenGroupNorm, to_grid, to_tokens
from nnunetv2_lightnets.networks.recompute import recomputed

PATCHES = [(16, 24), (8, 16, 8)]


def _pool(x: Tensor, stride: Any) -> Tensor:
    return (F.max_pool2d if x.ndim == 4 else F.max_pool3d)(x, stride)


def _convolution(x: Tensor, module: nn.Module) -> Tensor:
    """Torch's own, whatever the module does."""
    convolve, settings = (F.conv2d if x.ndim == 4 else F.conv3d), module
    return convolve(x, settings.weight, settings.bias, 1, settings.padding, settings.dilation, settings.groups)


def _batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    if not norm.training or x.numel() == x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    norm.num_batches_tracked += 1
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True)


def _axial(x: Tensor, axial: nn.Module) -> Tensor:
    return x + sum(_convolution(x, axis) for axis in axial.axes)


def _plain_ulite(network: Any, x: Tensor) -> Tensor:
    x, skips = _convolution(x, network.stem), []
    for stage in network.encoder:
        skips.append(_batch_norm(_axial(x, stage.axial), stage.norm))
        x = F.gelu(_pool(_convolution(skips[-1], stage.pointwise), stage.stride))
    x = _convolution(x, network.bottleneck.reduce)
    x = torch.cat([x, *(_axial(x, branch) for branch in network.bottleneck.branches)], 1)
    x = F.gelu(_convolution(_batch_norm(x, network.bottleneck.norm), network.bottleneck.expand))
    for stage, skip in zip(network.decoder.stages, reversed(skips), strict=True):
        x = torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1)
        x = _batch_norm(_convolution(x, stage.reduce), stage.norm)
        x = F.gelu(_convolution(_axial(x, stage.axial), stage.pointwise))
    return _convolution(x, network.decoder.seg_layers[0])


def _plain_block(block: Any, x: Tensor) -> Tensor:
    hidden = F.relu6(_batch_norm(_convolution(x, block.expand), block.expand_norm))
    mixed = sum(F.relu6(_batch_norm(_convolution(hidden, b.convolution), b.norm)) for b in block.branches)
    shuffled = mixed.unflatten(1, (block.groups, -1)).transpose(1, 2).flatten(1, 2)
    shortcut = x if isinstance(block.shortcut, nn.Identity) else _convolution(x, block.shortcut)
    return _batch_norm(_convolution(shuffled, block.project), block.project_norm) + shortcut


def _plain_ultralight_unet(network: Any, x: Tensor) -> Tensor:
    skips = []
    for stage, stride in zip(network.encoder, network.strides, strict=True):
        for block in stage:
            x = _plain_block(block, x)
        x = _pool(x, stride)
        skips.append(x)
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    for stage, skip in zip(network.decoder.stages, [*reversed(skips[:-1]), None], strict=True):
        x = stage.attention(x) * x
        x = _plain_block(stage.block, network.decoder.spatial_attention(x) * x)
        x = F.relu(F.interpolate(x, scale_factor=stage.stride, mode=mode))
        if skip is not None:
            gate = stage.gate
            query = _batch_norm(_convolution(x, gate.query), gate.query_norm)
            found = F.relu(query + _batch_norm(_convolution(skip, gate.key), gate.key_norm))
            x = x + skip * torch.sigmoid(_batch_norm(_convolution(found, gate.weigh), gate.weigh_norm))
    return _convolution(x, network.decoder.seg_layers[0])


PLAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ulite": _plain_ulite,
    "ultralight_unet": _plain_ultralight_unet,
}
SMALL: dict[str, dict[str, Any]] = {
    "ulite": {"channels": (4, 6, 8)},
    "ultralight_unet": {"channels": (4, 6, 4, 4, 4), "depths": (1, 2, 1, 1, 1)},
}


def _network(name: str, patch: tuple[int, ...]) -> nn.Module:
    dims, settings = len(patch), SMALL[name]
    strides = [(2,) * dims, (2,) * dims, *[(1,) * dims] * 3][: 2 if name == "ulite" else 5]
    network = create_network(name, spatial_dims=dims, input_channels=2, num_classes=3, strides=strides, **settings)
    return as_trained(network).double()


def _trained(network: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Logits, gradients and state after one step."""
    network.zero_grad()
    logits = forward()
    (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    gradients = {f"{key}.grad": p.grad for key, p in network.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **network.state_dict()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for key, value in expected.items() if key.endswith(".grad"))
    for key, value in expected.items():
        scale = largest if key.endswith(".grad") else max(1, value.abs().max().item())
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance * scale, msg=key)


@pytest.mark.parametrize("patch", PATCHES, ids=["2D", "3D"])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "how", ["training", "evaluation", "frozen", "copied", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_a_step_is_that_of_the_plain_network(name: str, patch: tuple[int, ...], how: str) -> None:
    network = _network(name, patch).train(how != "evaluation")
    if how == "frozen":  # all but some, among them no first one
        for number, parameter in enumerate(network.parameters()):
            parameter.requires_grad_(number % 3 == 2)
    plain, x = copy.deepcopy(network), torch.randn(2, 2, *patch, dtype=torch.float64)
    if how == "copied":  # after a step
        _trained(network, lambda: network(x))
        _trained(plain, lambda: PLAIN[name](plain, x))
        network = copy.deepcopy(network)
    run: Any = network
    if how == "compiled":
        torch._dynamo.reset()
        run = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    expected = _trained(plain, lambda: PLAIN[name](plain, x))
    _assert_equal(_trained(network, lambda: run(x)), expected, 1e-10)


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_with_mixed_precision_is_close(name: str) -> None:
    network = _network(name, (16, 16)).float()
    plain, x = copy.deepcopy(network), torch.randn(2, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = _trained(network, lambda: network(x))
        expected = _trained(plain, lambda: PLAIN[name](plain, x))
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
    difference = (found["logits"].float() - expected["logits"].float()).abs().mean()
    assert difference < 0.05 * expected["logits"].float().abs().mean()


def _block() -> nn.Sequential:
    return nn.Sequential(BatchNorm(3), nn.ReLU6(), nn.Conv2d(3, 4, 1), BatchNorm(4), nn.GELU()).double()


def test_a_block_is_used_twice_and_its_gradient_taken_twice() -> None:
    block, x = _block(), torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(block)
    out, expected = recomputed(block, x) + recomputed(block, x.sin()), plain(x) + plain(x.sin())
    torch.testing.assert_close(out, expected)
    inputs, plain_inputs = [x, *block.parameters()], [x, *plain.parameters()]
    for _ in range(2):
        found = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        for gradient, other in zip(
            found, torch.autograd.grad(expected.square().sum(), plain_inputs, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[key], value, msg=key)


def test_a_block_inside_a_block_counts_each_batch_once() -> None:
    block, x = _block(), torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(block)
    out = recomputed(lambda z: recomputed(block, z).cos(), x)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x), torch.autograd.grad(plain(x).cos().sum(), x), rtol=1e-10, atol=1e-10
    )
    assert block[0].num_batches_tracked == block[3].num_batches_tracked == 1
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[key], value, msg=key)


def test_gradcheck() -> None:
    block, x = _block(), torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: recomputed(block, z), (x, *block.parameters()))


# ---- LightM-UNet's convolutions ----


def _group_norm(tokens: Tensor, norm: TokenGroupNorm) -> Tensor:
    return F.relu(F.group_norm(tokens.mT, 8, norm.weight, norm.bias, norm.eps).mT)


def _plain_residual(block: ResidualConvBlock, tokens: Tensor, spatial: tuple[int, ...]) -> Tensor:
    x = to_tokens(_convolution(to_grid(_group_norm(tokens, block.norm1), spatial), block.depthwise))
    return _group_norm(x @ block.pointwise.weight.T + block.skip_scale * tokens, block.norm2)


def _plain_decoder(decoder: Decoder, features: list[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
    (tokens, coarse), (skip, spatial) = features[1], features[0]
    stage, head = decoder.stages[0], decoder.seg_layers[0]
    grid = to_grid(tokens @ stage.reduce.weight.T, coarse)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    tokens = to_tokens(F.interpolate(grid, size=spatial, mode=mode)) + skip
    for block in stage.blocks:
        tokens = _plain_residual(block, tokens, spatial)
    tokens = _group_norm(tokens, decoder.norm) * decoder.scale + decoder.offset
    return head(tokens).mT.unflatten(2, spatial)


@pytest.mark.parametrize("spatial", [(6, 8), (4, 6, 2)], ids=["2D", "3D"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_lightm_decoder_is_the_plain_one(spatial: tuple[int, ...], frozen: bool) -> None:
    decoder = as_trained(Decoder(len(spatial), 8, [2], 3)).double()
    if frozen:
        for number, parameter in enumerate(decoder.parameters()):
            parameter.requires_grad_(number % 2 == 1)
    coarse, voxels = tuple(side // 2 for side in spatial), torch.Size(spatial).numel()
    tokens = torch.randn(2, voxels // 2 ** len(spatial), 16, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(2, voxels, 8, dtype=torch.float64, requires_grad=True)
    inputs = [tokens, skip, *(p for p in decoder.parameters() if p.requires_grad)]
    features = [(skip, spatial), (tokens, coarse)]
    out, expected = decoder(features), _plain_decoder(decoder, features)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    for found, other in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10 * other.abs().max().item())


# ---- Memory ----


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages saved for the backward pass, parameters aside."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


@pytest.mark.parametrize(
    ("name", "patch", "most"),
    [
        ("ulite", (64, 64), 540),
        ("ulite", (32, 32, 32), 390),
        ("ultralight_unet", (64, 64), 960),
        ("ultralight_unet", (32, 32, 32), 470),
    ],
)
def test_what_is_kept_for_the_backward_pass(name: str, patch: tuple[int, ...], most: int) -> None:
    """In bytes per voxel of the input; plain forms keep 2 to 5 times as much."""
    network = create_network(name, spatial_dims=len(patch), input_channels=1, num_classes=3).train()
    x = torch.randn(2, 1, *patch)
    saved = _Saved()
    with saved:
        network(x)
    assert saved.bytes < most * x.numel()


@pytest.mark.parametrize("spatial", [(16, 16), (8, 8, 8)], ids=["2D", "3D"])
def test_lightm_residual_convolutions_keep_their_input(spatial: tuple[int, ...]) -> None:
    block, tokens = ResidualConvBlock(len(spatial), 16), torch.randn(2, torch.Size(spatial).numel(), 16)
    saved = _Saved()
    with saved:
        block(tokens.requires_grad_(), spatial)
    assert saved.bytes <= tokens.untyped_storage().nbytes() + 1000


# ---- What must not be computed again, or not otherwise ----


def test_batch_norms_of_several_processes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net converts them in distributed training; they know nothing of a second time."""
    network = create_network("ulite", spatial_dims=2, input_channels=1, num_classes=2, channels=(4, 8)).eval()
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    x = torch.randn(1, 1, 8, 8)
    blocks: list[object] = []
    checkpoint = recompute.checkpoint
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        recompute, "checkpoint", lambda block, *a, **k: (blocks.append(block), checkpoint(block, *a, **k))[1]
    )
    expected = network(x)
    assert blocks
    blocks.clear()
    torch.testing.assert_close(converted(x), expected)
    assert not blocks


def test_a_scan_is_computed_again_by_the_backend_that_was_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_lightnets.networks.vss import VSSBlock
    from nnunetv2_lightnets.ops.selective_scan import native
    from nnunetv2_lightnets.ops.selective_scan.dispatch import use_backend

    def fail(*_: object) -> None:
        raise AssertionError("another backend")

    monkeypatch.setattr(native, "forward", fail)
    block = VSSBlock(16, d_state=2)
    with use_backend("torch"):
        out = block(torch.randn(1, 4, 4, 16))
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_a_cumulative_average_counts_each_batch_once() -> None:
    """Momentum None, which torch's batch norm knows."""
    norm, plain = BatchNorm(3), torch.nn.BatchNorm2d(3)
    norm.momentum = plain.momentum = None
    for _ in range(3):
        x = torch.randn(2, 3, 5, 5)
        recomputed(lambda x: norm(x).square(), x.requires_grad_()).sum().backward()
        plain(x)
    assert norm.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_windows_with_more_voxels_than_a_byte_counts() -> None:
    x = torch.randn(1, 1, 16, 16, 16, requires_grad=True)
    layers.max_pool(x, (8, 8, 8)).sum().backward()
    assert x.grad is not None and x.grad.sum() == 8


def test_a_network_can_be_recorded_with_gradients_on() -> None:
    network = create_network("ulite", spatial_dims=2, input_channels=1, num_classes=2, channels=(4, 8)).eval()
    x = torch.randn(1, 1, 8, 8)
    recorded = torch.jit.trace(network, x, check_trace=False)
    torch.testing.assert_close(torch.jit.load(_saved(recorded))(x), network(x))


def _saved(module: torch.jit.ScriptModule) -> io.BytesIO:
    stream = io.BytesIO()
    torch.jit.save(module, stream)
    stream.seek(0)
    return stream
