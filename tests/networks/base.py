"""What every network must do, as tests: a network's own test file subclasses :class:`NetworkTests`.

    class TestULite(NetworkTests):
        name = "ulite"
        settings = {"channels": (4, 8, 16)}
        stride = 4

The own file then holds what is the network's alone: parity with the published code, exact counts, its peculiarities.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from torch import Tensor, nn

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks import list_networks, network_entry, prepare_for_inference

Patch = tuple[int, ...]
SMALL_PATCHES: dict[int, Patch] = {2: (36, 33), 3: (12, 16, 9)}  # by the dimension


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits from fine to coarse, whether the network returns one tensor or a list."""
    found = network(x)
    return found if isinstance(found, list) else [found]


def loss(logits: Sequence[Tensor]) -> Tensor:
    return sum((head.square().mean() for head in logits), torch.zeros(()))


def values_and_gradients(layer: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The layer's result, and gradients of ``x`` and the parameters; memory formats make no difference to them."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


@torch.no_grad()
def as_trained(network: nn.Module) -> nn.Module:
    """The network with weights and running statistics far from their initial values."""
    for key, tensor in network.state_dict().items():
        if key.endswith(("norm.weight", "running_var")):
            tensor.uniform_(0.5, 2.0)
        elif key.endswith(("norm.bias", "running_mean")):
            tensor.normal_()
        elif tensor.is_floating_point():
            tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5)
    return network


def padded(x: Tensor, stride: int | Patch) -> Tensor:
    """``x`` with zeros at the end of each axis up to a multiple of ``stride``."""
    sides = x.shape[2:]
    strides = (stride,) * len(sides) if isinstance(stride, int) else stride
    out = x.new_zeros(*x.shape[:2], *(side + -side % s for side, s in zip(sides, strides, strict=True)))
    out[(..., *(slice(side) for side in sides))] = x
    return out


class NetworkTests:
    """The tests. A subclass says which network, how it is built small, and what it cannot do."""

    name: str
    settings: dict[str, Any] = {}  # a small architecture: the tests build it some fifty times
    tiny: dict[str, Any] = {}  # what to change in it for compilers, which take seconds for each stage
    stride: int | None = None  # to whose multiple the small one pads; None: it pads in a way of its own
    scales: Sequence[float] = (1.0,)  # of the small one's outputs under deep supervision
    needs_patch_size: bool = False  # whether it is built for one patch, and bound to it
    compiled: bool = True  # whether torch.compile takes it as one graph
    exported: bool = True  # whether torch.export takes it
    slow: Sequence[str] = ("compiles 3D", "exports 3D")  # what is tested with -m slow only
    scans: Mapping[int, int] = {}  # in the exported graph of the tiny one, each a single node, by the dimension
    float32_error: float = 1e-5  # of the logits, relative to the largest
    bfloat16_error: float = 0.05  # of the logits under autocast, relative, in the mean

    patches: Sequence[Patch] = ((8, 8), (9, 70), (8, 8, 8), (5, 24, 17))  # any there may be
    cases: Sequence[tuple[Patch, dict[str, Any]]] = ()  # further patches, with settings of their own

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "patch" in metafunc.fixturenames:
            patches = SMALL_PATCHES.values() if "for_prediction" in metafunc.function.__name__ else self.patches
            cases = [*((patch, {}) for patch in patches if len(patch) in self.dims), *self.cases]
            ids = ["x".join(map(str, patch)) for patch, _ in cases]
            metafunc.parametrize(("patch", "settings"), cases, ids=ids)
        elif "small_patch" in metafunc.fixturenames:  # one for each dimension
            verb = metafunc.function.__name__.split("_")[1]
            slow = [f"{verb} {dims}D" in self.slow for dims in self.dims]
            parameters = [
                pytest.param(SMALL_PATCHES[dims], id=f"{dims}D", marks=pytest.mark.slow if is_slow else ())
                for dims, is_slow in zip(self.dims, slow, strict=True)
            ]
            metafunc.parametrize("small_patch", parameters)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions to test; where there is a reason not to test all, a class attribute says so."""
        return network_entry(self.name).spatial_dims

    @property
    def deep_supervision(self) -> bool:
        return network_entry(self.name).deep_supervision

    @property
    def small_patch(self) -> Patch:
        """For tests to which neither the size nor the dimension matters."""
        return SMALL_PATCHES[min(self.dims)]

    def build(self, patch: Patch, **settings: Any) -> Any:
        """The small network for images of this size: one channel and two classes, unless told otherwise."""
        settings = {"input_channels": 1, "num_classes": 2} | self.settings | settings
        if self.needs_patch_size:
            settings["patch_size"] = patch
        return create_network(self.name, spatial_dims=len(patch), **settings)

    def sizes(self, patch: Patch, settings: dict[str, Any]) -> list[Patch]:
        """Of the outputs, from fine to coarse: those of nnU-Net's targets, for every side that is not rounded to 0."""
        if not self.deep_supervision:
            return [patch]
        scales = [[scale] * len(patch) for scale in self.scales]
        if "strides" in settings:
            scales = (1 / torch.tensor(settings["strides"]).cumprod(0))[:-1].tolist()
        sizes = [tuple(round(side * s) for side, s in zip(patch, scale, strict=True)) for scale in scales]
        some = [scale for scale, size in zip(scales, sizes, strict=True) if min(size) > 0]
        targets = DownsampleSegForDSTransform(some)(segmentation=torch.zeros(1, *patch))["segmentation"]
        assert [tuple(target.shape[1:]) for target in targets] == [size for size in sizes if min(size) > 0]
        return [tuple(max(1, side) for side in size) for size in sizes]

    # ---- Shapes and gradients ----

    def test_any_patch_trains_and_predicts(self, patch: Patch, settings: dict[str, Any]) -> None:
        network = self.build(patch, input_channels=2, num_classes=3, deep_supervision=self.deep_supervision, **settings)
        x = torch.randn(1, 2, *patch)
        before, sizes = x.clone(), [(1, 3, *size) for size in self.sizes(patch, settings)]
        expected = [head.detach() for head in outputs(network.eval(), x)]
        with torch.inference_mode():
            logits = outputs(network, x)
            assert [tuple(head.shape) for head in logits] == sizes
            for head, other in zip(logits, expected, strict=True):
                assert head.isfinite().all()
                torch.testing.assert_close(head, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))
            logits[0].add_(1.0)  # whoever gets them may change them in place
            assert torch.equal(x, before)
        logits = outputs(network.train(), x)  # prediction left nothing behind that stops training
        assert [tuple(head.shape) for head in logits] == sizes
        loss(logits).backward()
        wrong = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert wrong == []

    def test_a_patch_is_padded_with_zeros_at_the_end(self, patch: Patch, settings: dict[str, Any]) -> None:
        stride = self.stride
        if "strides" in settings:
            stride = tuple(torch.tensor(settings["strides"]).prod(0).tolist())
        elif stride is None:
            pytest.skip("pads in a way of its own")
        network = self.build(patch, deep_supervision=self.deep_supervision, **settings).eval()
        x = torch.randn(1, 1, *patch)
        with torch.no_grad():
            for head, larger in zip(outputs(network, x), outputs(network, padded(x, stride)), strict=True):
                assert torch.equal(head, larger[(..., *map(slice, head.shape[2:]))])
                assert head.is_contiguous() or (head.shape == larger.shape and head.movedim(1, -1).is_contiguous())

    def test_any_number_of_channels_and_classes(self) -> None:
        for channels, classes in ((1, 1), (2, 3), (3, 1), (4, 2), (5, 15)):
            network = self.build(self.small_patch, input_channels=channels, num_classes=classes).eval()
            with torch.no_grad():
                assert network(torch.randn(1, channels, *self.small_patch)).shape == (1, classes, *self.small_patch)

    def test_images_of_a_batch_do_not_meet(self) -> None:
        network, x = (
            self.build(self.small_patch).eval().double(),
            torch.randn(3, 1, *self.small_patch, dtype=torch.float64),
        )
        with torch.no_grad():
            together, alone = network(x), torch.cat([network(image[None]) for image in x])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)

    def test_built_without_memory_it_knows_its_shapes(self) -> None:
        with torch.device("meta"):
            network, x = self.build(self.small_patch), torch.empty(1, 1, *self.small_patch)
        assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
        with torch.no_grad():
            assert network.eval()(x).shape == (1, 2, *self.small_patch)

    # ---- Deep supervision and the state dict ----

    def test_deep_supervision_changes_what_is_returned_and_nothing_else(self) -> None:
        network, x = self.build(self.small_patch).eval(), torch.randn(1, 1, *self.small_patch)
        single = network(x)
        assert network.decoder.deep_supervision is False and isinstance(single, Tensor)
        network.decoder.deep_supervision = True  # nnU-Net's trainers set it, and set it back
        switched = outputs(network, x)
        assert torch.equal(switched[0], single)
        assert len(switched) == (len(self.scales) if self.deep_supervision else 1)
        network.decoder.deep_supervision = False
        assert torch.equal(network(x), single)
        if self.deep_supervision:
            supervised = self.build(self.small_patch, deep_supervision=True).eval()
            supervised.load_state_dict(network.state_dict())
            assert all(torch.equal(*pair) for pair in zip(outputs(supervised, x), switched, strict=True))

    def test_only_the_heads_depend_on_the_classes(self) -> None:
        """Their keys hold ".seg_layers.", which nnU-Net's -pretrained_weights leaves out."""
        two, five = (self.build(self.small_patch, num_classes=classes).state_dict() for classes in (2, 5))
        heads = {key for key in two if ".seg_layers." in key}
        assert two.keys() == five.keys() and len(heads) == 2 * len(self.scales)
        assert {key for key in two if two[key].shape != five[key].shape} == heads

    def test_copies_and_files_give_the_same_logits(self) -> None:
        network, other, x = (
            self.build(self.small_patch),
            self.build(self.small_patch),
            torch.randn(1, 1, *self.small_patch),
        )
        file = io.BytesIO()
        torch.save(as_trained(network).eval().state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        with torch.inference_mode():
            logits = network(x)
            assert torch.equal(network(x), logits)  # to the bit, every time
            for again in (other.eval(), copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
                assert torch.equal(again(x), logits)

    # ---- Precision ----

    def test_double_precision_agrees(self, small_patch: Patch) -> None:
        network, x = self.build(small_patch).eval(), torch.randn(1, 1, *small_patch)
        with torch.no_grad():
            single, double = network(x), network.double()(x.double())
        assert double.dtype == torch.float64
        tolerance = self.float32_error * max(1.0, double.abs().max().item())
        torch.testing.assert_close(single.double(), double, rtol=0, atol=tolerance)

    def test_mixed_precision_is_finite_and_close(self, small_patch: Patch) -> None:
        network = self.build(small_patch, deep_supervision=self.deep_supervision).eval()
        x = 100 * torch.randn(2, 1, *small_patch)
        with torch.no_grad():
            exact = outputs(network, x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = [head.float() for head in outputs(network, x)]
            loss(logits).backward()
        for head, expected in zip(logits, exact, strict=True):
            assert (head.detach() - expected).abs().mean() < self.bfloat16_error * expected.abs().mean()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)

    # ---- Prediction, compilers ----

    def test_the_copy_for_prediction_computes_the_same(self, patch: Patch, settings: dict[str, Any]) -> None:
        network = as_trained(self.build(patch, deep_supervision=self.deep_supervision, **settings)).train()
        before, x = copy.deepcopy(network.state_dict()), torch.randn(1, 1, *patch)
        prepared = prepare_for_inference(network)
        again = prepare_for_inference(prepared)
        assert not prepared.training and not any(p.requires_grad for p in prepared.parameters())
        with torch.inference_mode():
            found = outputs(prepared, x)
            assert all(torch.equal(*pair) for pair in zip(outputs(again, x), found, strict=True))
            assert found[0].std() > 0.01
            for tensor in prepared.state_dict().values():
                tensor.zero_()
        assert network.training and all(p.requires_grad and p.is_contiguous() for p in network.parameters())
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
        for head, expected in zip(found, outputs(network.eval(), x), strict=True):
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(head, expected.detach(), rtol=0, atol=1e-4 * scale)

    def test_compiles_into_one_graph(self, small_patch: Patch) -> None:
        """In training, with gradients; in float64: where eager and compiled code differ, it is not by rounding."""
        if not self.compiled:
            pytest.skip("is not compiled")
        network = as_trained(self.build(small_patch, deep_supervision=self.deep_supervision, **self.tiny))
        network, x = network.double().train(), torch.randn(2, 1, *small_patch, dtype=torch.float64)
        torch._dynamo.reset()  # else sizes seen in other tests become symbols
        compiled = torch.compile(copy.deepcopy(network), backend="aot_eager", fullgraph=True)
        logits, expected = outputs(compiled, x), outputs(network, x)
        loss(logits).backward()
        loss(expected).backward()
        torch.testing.assert_close(logits, expected)
        scale = max(p.grad.abs().max().item() for p in network.parameters())
        for (key, own), found in zip(network.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(found.grad, own.grad, rtol=1e-6, atol=1e-9 * scale, msg=key)

    def test_exports(self, small_patch: Patch) -> None:
        if not self.exported:
            pytest.skip("is not exported")
        network = self.build(small_patch, **self.tiny).eval().double()
        x = torch.randn(1, 1, *small_patch, dtype=torch.float64)
        with torch.no_grad():
            program = torch.export.export(network, (x,))
            torch.testing.assert_close(program.module()(x), network(x))
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        scans = [name for name in calls if "scan" in name or "mamba_layer" in name]
        assert len(scans) == self.scans.get(len(small_patch), 0)

    # ---- What is refused ----

    @pytest.mark.parametrize("directly", [False, True], ids=["by its name", "its class"])
    def test_settings_that_no_network_takes_are_refused(self, directly: bool) -> None:
        entry = network_entry(self.name)

        def refused(**settings: Any) -> str:
            settings = {"spatial_dims": entry.spatial_dims[0], "input_channels": 1, "num_classes": 2, **settings}
            settings |= {"patch_size": (16,) * entry.spatial_dims[0]} if self.needs_patch_size else {}
            with pytest.raises(LightNetsError) as error:
                entry.network_class(**settings) if directly else create_network(self.name, **settings)
            assert "\n" not in str(error.value)
            return str(error.value)

        exists = " and ".join(f"{dims}D" for dims in entry.spatial_dims)
        for dims in {1, 2, 3, 4} - set(entry.spatial_dims):
            message = refused(spatial_dims=dims)
            others = ", ".join(list_networks(dims)) or "none"
            assert message == f"{self.name} exists in {exists} only, not in {dims}D; {dims}D networks: {others}"
        assert f"{self.name} does not take this setting: wdith; its settings are spatial_dims, " in refused(wdith=3)
        for label in ("input_channels", "num_classes"):
            assert f"{self.name}: {label} must be at least 1, got 0" in refused(**{label: 0})
        if not self.deep_supervision:
            assert f"{self.name} has one output, deep_supervision must be False" in refused(deep_supervision=True)
