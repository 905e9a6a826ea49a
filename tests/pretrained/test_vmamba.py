"""Loading VMamba-Tiny's ImageNet weights: what arrives where, and every way it can fail."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.networks.swin_umamba import SwinUMamba
from nnunetv2_lightnets.networks.swin_umamba_d import SwinUMambaD
from nnunetv2_lightnets.pretrained import load_vmamba, vmamba_path
from nnunetv2_lightnets.pretrained.cache import RECORD_FILE, VMAMBA_URLS, FileRecord, write_record
from nnunetv2_lightnets.pretrained.vmamba import adapt_input_channels, read_vmamba, vmamba_tiny_shapes

SaveCheckpoint = Callable[..., Path]

# SHA-256 of the sorted "name shape" lines of the published checkpoint, from VMamba's own code.
PUBLISHED_LAYOUT = "7e69da1ec21b039418466ac3c45baaedf4656057dd9f1f59a7fd5be1174e2142"


class Encoder(nn.Module):
    """Two blocks with VMamba's keys but for `downsample`, which is kept apart as Swin-UMamba does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, 4, 4, 4), "norm": nn.LayerNorm(4)})
        self.layers = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList([Block(dim)])}) for dim in (4, 8))
        self.downsamples = nn.ModuleList([nn.Linear(16, 8, bias=False)])


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = nn.Module()
        self.self_attention.A_logs = nn.Parameter(torch.randn(8 * dim, 16))
        self.self_attention.out_proj = nn.Linear(2 * dim, dim, bias=False)


class Small(nn.Module):
    """A network with that encoder; `vmamba_keys` like the real ones'."""

    def __init__(self, channels: int = 3, extra: int = 0, stem: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(channels)
        if extra:
            self.encoder.extra = nn.Parameter(torch.zeros(extra))  # not in the checkpoint
        self.head = nn.Conv2d(4, 2, 1)
        self.stem = stem

    def vmamba_keys(self) -> dict[str, str]:
        names = [n for n, _ in self.encoder.named_parameters() if n != "extra"]
        names = [n for n in names if self.stem or not n.startswith("patch_embed.")]
        return {re.sub(r"^downsamples\.(\d)\.", r"layers.\1.downsample.reduction.", n): f"encoder.{n}" for n in names}


def small_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    network = Small()
    own = network.state_dict()
    encoder = {key: torch.randn_like(own[target]) for key, target in network.vmamba_keys().items()}
    return encoder | {"norm.weight": torch.ones(8), "head.weight": torch.zeros(10, 8), "head.bias": torch.zeros(10)}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As later VMamba code saves the same tensors."""
    rules = [
        ("patch_embed.proj", "patch_embed.0"),
        ("patch_embed.norm", "patch_embed.2"),
        (".ln_1.", ".norm."),
        (".self_attention.", ".op."),
    ]
    new = {}
    for key, tensor in state.items():
        for old, name in rules:
            key = key.replace(old, name)
        new["classifier." + key if key.startswith(("norm.", "head.")) else key] = tensor
    return new


def refused(network: nn.Module, path: Path) -> str:
    """The message of the failed loading; the network must be as before."""
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(LightNetsError) as error:
        load_vmamba(network, path)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    message = str(error.value)
    assert "\n" not in message
    assert "nnUNetv2_lightnets weights" in message or "published" in message  # the remedy
    return message


# --- the published layout -------------------------------------------------------------------------------------------


def test_layout_is_the_published_one() -> None:
    shapes = vmamba_tiny_shapes()
    assert len(shapes) == 212
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 22_893_448
    lines = "\n".join(sorted(f"{name} {list(shape)}" for name, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == PUBLISHED_LAYOUT


# --- what arrives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [dict, renamed], ids=["v0", "renamed"])
@pytest.mark.parametrize("kind", ["pth", "bare pth", "safetensors", "parallel"])
def test_loads_the_encoder_and_nothing_else(
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]], kind: str, save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    state = small_state()
    saved, path = layout(state), tmp_path / "weights"  # the content tells the format, not the name
    if kind == "pth":
        path = save_checkpoint(saved)
    elif kind == "bare pth":
        torch.save(saved, path)
    elif kind == "safetensors":
        save_file(saved, path)
    else:
        path = save_checkpoint({f"module.{key}": tensor for key, tensor in saved.items()})
    network = Small()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    report = load_vmamba(network, path)
    targets = network.vmamba_keys()
    for key, target in targets.items():
        assert torch.equal(network.state_dict()[target], state[key]), key
    untouched = set(before) - set(targets.values())
    assert untouched == {"head.weight", "head.bias"}
    assert all(torch.equal(before[key], network.state_dict()[key]) for key in untouched)
    assert (report.tensors, report.encoder_share, report.adapted) == (len(targets), 1.0, ())
    assert report.path == path and report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_report_is_one_line_for_the_log(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small_state(), path, {"source": "https://example.org/vmamba.pth"})
    line = str(load_vmamba(Small(channels=1), path))
    assert "\n" not in line
    for part in ("13 tensors", "100.00% of the encoder", str(path), "SHA-256", "https://example.org/vmamba.pth"):
        assert part in line, part
    assert "adapted: encoder.patch_embed.proj.weight from 3 to 1 input channels" in line


def test_stays_trainable_in_the_networks_dtype(save_checkpoint: SaveCheckpoint) -> None:
    path = save_checkpoint({key: tensor.double() for key, tensor in small_state().items()})
    network = Small()
    parameters = list(network.parameters())
    load_vmamba(network, path)
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))  # the optimizer's tensors
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_leaf for p in network.parameters())


# --- other input channels -------------------------------------------------------------------------------------------


def test_grey_image_gives_the_output_of_the_same_image_in_rgb() -> None:
    weight, grey = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    output = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight, stride=4)
    torch.testing.assert_close(nn.functional.conv2d(grey, adapt_input_channels(weight, 1), stride=4), output)


@pytest.mark.parametrize("channels", [2, 3, 4, 6, 7])
def test_channels_take_red_green_blue_in_turn(channels: int) -> None:
    weight = torch.randn(5, 3, 2, 2)
    adapted = adapt_input_channels(weight, channels)
    assert adapted.shape == (5, channels, 2, 2)
    for channel in range(channels):
        torch.testing.assert_close(adapted[:, channel], weight[:, channel % 3] * 3 / channels)
    if channels % 3 == 0:  # equal channels then get exactly the grey output
        torch.testing.assert_close(adapted.sum(1), weight.sum(1))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_adapted_weights_arrive_and_are_reported(channels: int, save_checkpoint: SaveCheckpoint) -> None:
    state = small_state()
    network = Small(channels)
    report = load_vmamba(network, save_checkpoint(state))
    proj = network.encoder.patch_embed["proj"]
    torch.testing.assert_close(proj.weight, adapt_input_channels(state["patch_embed.proj.weight"], channels))
    assert torch.equal(proj.bias, state["patch_embed.proj.bias"])
    assert report.adapted == (f"encoder.patch_embed.proj.weight from 3 to {channels} input channels",)


# --- every failure has its own message ------------------------------------------------------------------------------


def test_missing_file(cache: Path) -> None:
    message = refused(Small(), vmamba_path())
    assert f"no ImageNet weights at {cache}" in message
    assert VMAMBA_URLS[0] in message and "--from FILE" in message
    elsewhere = refused(Small(), cache / "other.pth")
    assert f"kept at {vmamba_path()}" in elsewhere


@pytest.mark.parametrize("share", [0.3, 0.99])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated(kind: str, share: float, save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    path = save_checkpoint(small_state())
    if kind == "safetensors":
        save_file(small_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated" in refused(Small(), path)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x00" * 5000, b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_a_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    assert f"({len(content):,} bytes) is neither a PyTorch checkpoint" in refused(Small(), path)


@pytest.mark.parametrize("start", ["<!DOCTYPE html><html>", "\n  <html lang='en'>", "\ufeff<!doctype HTML>"])
def test_html_page(start: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_text(start + "Sign in to GitHub", "utf-8")
    assert "is an HTML page" in refused(Small(), path)


def test_damaged_inside(save_checkpoint: SaveCheckpoint) -> None:
    path = save_checkpoint(small_state())
    content = path.read_bytes()
    start = content.index(b"data.pkl") + 60
    path.write_bytes(content[:start] + bytes(200) + content[start + 200 :])
    assert "damaged" in refused(Small(), path)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_whatever_is_changed_in_a_file_it_is_loaded_or_refused(
    kind: str, save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """Never another error, a crash, or a network that is half loaded."""
    path = save_checkpoint(small_state())
    if kind == "safetensors":
        save_file(small_state(), path)
    content, generator = path.read_bytes(), random.Random(0)
    refusals = 0
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 3, 30))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        start, length = generator.randrange(len(changed)), generator.choice((0, 0, 1, 64, 2000))
        del changed[start : start + length]
        path.write_bytes(changed)
        network = Small()
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        try:
            load_vmamba(network, path)
        except LightNetsError:
            refusals += 1
            assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert refusals > 50


class Hostile:
    """Unpickled naively, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
@pytest.mark.parametrize("function", ["system", "exec", "call"])
def test_hostile_pickle_is_not_run(function: str, where: str, save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = {
        "system": Hostile(os.system, f"touch '{mark}'"),
        "exec": Hostile(exec, f"open({str(mark)!r}, 'w')"),
        "call": Hostile(subprocess.call, ["touch", str(mark)]),
    }[function]
    if where == "beside":
        path = save_checkpoint(small_state(), config=hostile)
    elif where == "inside":
        path = save_checkpoint(small_state() | {"head.bias": hostile})  # type: ignore[dict-item]
    else:
        path = tmp_path / "checkpoint.pth"
        torch.save(hostile, path)
    message = refused(Small(), path)
    assert re.search(rf"asks to run (\w+\.)?{function} when", message) and "nothing of it was run" in message
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it does bite
    assert mark.exists()


def yacs_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A nested configuration that pickles as yacs' does, without yacs."""

    class CfgNode(dict):  # type: ignore[type-arg]
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    package.config = config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    node = CfgNode(MODEL=CfgNode(TYPE="vssm", DEPTHS=[2, 2, 9, 2]), AMP=True)
    node.__dict__["__immutable__"] = True
    return node


def test_first_uploads_with_a_yacs_configuration_load_without_yacs(
    save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        path = save_checkpoint(small_state(), config=yacs_config(patch))
    assert load_vmamba(Small(), path).encoder_share == 1.0
    # The permission ended with the call.
    with pytest.raises(Exception, match=r"yacs\.config\.CfgNode"):
        torch.load(path, weights_only=True)


def later_vmamba() -> dict[str, Tensor]:
    """Part of v05's layout: no gate, one state, an MLP in each block, two convolutions as stem."""
    return {
        "patch_embed.0.weight": torch.zeros(48, 3, 3, 3),
        "patch_embed.5.weight": torch.zeros(96, 48, 3, 3),
        "layers.0.blocks.0.norm.weight": torch.zeros(96),
        "layers.0.blocks.0.op.A_logs": torch.zeros(768, 1),
        "layers.0.blocks.0.op.x_proj_weight": torch.zeros(4, 8, 192),
        "layers.0.blocks.0.mlp.fc1.weight": torch.zeros(384, 96),
        "classifier.head.weight": torch.zeros(1000, 768),
    }


@pytest.mark.parametrize("without", ["", "mlp", "A_logs"])
def test_later_vmamba_is_called_so(without: str, save_checkpoint: SaveCheckpoint) -> None:
    state = later_vmamba()
    if without == "mlp":
        state = {key: tensor for key, tensor in state.items() if "mlp" not in key and "patch_embed.5" not in key}
    if without == "A_logs":
        state["layers.0.blocks.0.op.A_logs"] = torch.zeros(768, 16)
    assert "later VMamba (v05 or v2" in refused(Small(), save_checkpoint(state))


def test_other_models_are_called_no_vmamba(save_checkpoint: SaveCheckpoint) -> None:
    message = refused(Small(), save_checkpoint({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}))
    assert "no VMamba checkpoint" in message and "2 (conv1.weight, fc.bias)" in message


@pytest.mark.parametrize("content", [{}, {"model": {}}, [torch.zeros(1)], torch.zeros(1)], ids=str)
def test_checkpoint_without_weights(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    assert "holds no weights" in refused(Small(), path)


@pytest.mark.parametrize(
    "value",
    [
        [0.0],
        torch.zeros(10, dtype=torch.int64),
        torch.zeros(10, dtype=torch.complex64),
        torch.zeros(10).to_sparse(),
        torch.zeros(10, device="meta"),
    ],
    ids=["list", "integers", "complex", "sparse", "meta"],
)
def test_values_that_are_no_plain_tensors(value: Any, save_checkpoint: SaveCheckpoint) -> None:
    path = save_checkpoint(small_state() | {"head.bias": value})
    assert "not tensors of plain numbers: 1 (head.bias)" in refused(Small(), path)


def test_odd_keys_and_shapes(save_checkpoint: SaveCheckpoint) -> None:
    path = save_checkpoint(small_state() | {3: torch.zeros(1)})  # type: ignore[dict-item]
    assert "not tensors of plain numbers: 1 (3)" in refused(Small(), path)
    path = save_checkpoint(small_state() | {"layers.0.blocks.0.self_attention.A_logs": torch.tensor(1.0)})
    assert "state size 0, 16" in refused(Small(), path)


def test_missing_keys(save_checkpoint: SaveCheckpoint) -> None:
    state = small_state()
    del state["layers.1.blocks.0.ln_1.bias"]
    assert "missing: 1 (layers.1.blocks.0.ln_1.bias)" in refused(Small(), save_checkpoint(state))


def test_extra_keys(save_checkpoint: SaveCheckpoint) -> None:
    state = small_state() | {f"layers.1.blocks.{i}.ln_1.bias": torch.zeros(8) for i in range(1, 6)}
    assert "extra: 5 (layers.1.blocks.1.ln_1.bias, " in refused(Small(), save_checkpoint(state))


def test_wrong_shapes(save_checkpoint: SaveCheckpoint) -> None:
    state = small_state()
    state["layers.1.blocks.0.self_attention.out_proj.weight"] = torch.zeros(8, 8)
    message = refused(Small(), save_checkpoint(state))
    assert (
        "of another shape: 1 (layers.1.blocks.0.self_attention.out_proj.weight: (8, 8) instead of (8, 16))" in message
    )


def test_stem_of_another_kernel_is_not_adapted(save_checkpoint: SaveCheckpoint) -> None:
    state = small_state() | {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)}
    assert "patch_embed.proj.weight: (4, 3, 2, 2) instead of (4, 1, 4, 4)" in refused(Small(1), save_checkpoint(state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, save_checkpoint: SaveCheckpoint) -> None:
    state = small_state()
    state["layers.0.blocks.0.self_attention.A_logs"][3, 5] = value
    message = refused(Small(), save_checkpoint(state))
    assert "holds NaN or infinity in 1 (layers.0.blocks.0.self_attention.A_logs)" in message


def test_another_file_than_recorded(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small_state(), path)
    write_record(tmp_path, path.name, FileRecord.of(path, "https://example.org"))
    assert load_vmamba(Small(), path).tensors == 13
    changed = small_state()
    changed["layers.0.blocks.0.ln_1.bias"] += 1
    save_file(changed, path)
    message = refused(Small(), path)
    assert "is not the file first used" in message and str(tmp_path / RECORD_FILE) in message


def test_damaged_record(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small_state(), path)
    for text in ("{", "[]", '{"weights.safetensors": {"size": 3}}'):
        (tmp_path / RECORD_FILE).write_text(text)
        with pytest.raises(LightNetsError, match=r"record of downloaded weights .* is damaged"):
            load_vmamba(Small(), path)


def test_less_than_99_percent_of_the_encoder(save_checkpoint: SaveCheckpoint) -> None:
    path = save_checkpoint(small_state())
    encoder = sum(p.numel() for p in Small().encoder.parameters())
    assert load_vmamba(Small(extra=encoder // 100), path).encoder_share == pytest.approx(0.99, abs=1e-3)
    assert "covers only 98.0% of the encoder" in refused(Small(extra=encoder // 49), path)


def test_networks_without_such_an_encoder() -> None:
    with pytest.raises(LightNetsError, match="Linear has no VMamba encoder"):
        load_vmamba(nn.Linear(1, 1), "nowhere")


# --- the real networks, at full size --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """A checkpoint of the published layout with random values, and its file."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in vmamba_tiny_shapes().items()}
    path = tmp_path_factory.mktemp("published") / "vmamba.safetensors"
    save_file(state, path)
    return state, path


@pytest.mark.parametrize(
    ("network_class", "channels", "tensors", "share"),
    [
        # Of 22,136,736 elements in the authors' encoder, all but the 18,720 of its patch embedding.
        (SwinUMamba, 1, 204, 22_118_016 / 22_136_736),
        (SwinUMamba, 3, 204, 22_118_016 / 22_136_736),
        (SwinUMambaD, 3, 208, 1.0),
        (SwinUMambaD, 1, 208, 1.0),
        (SwinUMambaD, 4, 208, 1.0),
    ],
)
def test_full_size(
    published: tuple[dict[str, Tensor], Path],
    network_class: type[SwinUMamba | SwinUMambaD],
    channels: int,
    tensors: int,
    share: float,
) -> None:
    state, path = published
    network = network_class(spatial_dims=2, input_channels=channels, num_classes=2, deep_supervision=True)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    report = load_vmamba(network, path)
    assert report.tensors == tensors
    assert report.encoder_share == pytest.approx(share, abs=1e-9)
    own, loaded = network.state_dict(), set()
    for key, tensor in state.items():
        if key.startswith(("norm.", "head.")) or (network_class is SwinUMamba and key.startswith("patch_embed.")):
            continue
        # The authors' names, which the encoder keeps.
        target = "vssm_encoder." + re.sub(r"^layers\.(\d)\.downsample\.", r"downsamples.\1.", key)
        if key == "patch_embed.proj.weight" and channels != 3:
            tensor = adapt_input_channels(tensor, channels)
        assert torch.equal(own[target], tensor), key
        loaded.add(target)
    assert len(loaded) == tensors
    assert all(torch.equal(before[key], own[key]) for key in set(own) - loaded)
    assert len(report.adapted) == (network_class is SwinUMambaD and channels != 3)


def test_full_size_from_the_authors_layouts(published: tuple[dict[str, Tensor], Path], tmp_path: Path) -> None:
    """Both layouts of the checkpoint, packed as VMamba packs it, read to the same tensors."""
    state, path = published
    expected, _ = read_vmamba(path)
    torch.save({"model": renamed(state)}, tmp_path / "renamed.pth")
    found, source = read_vmamba(tmp_path / "renamed.pth")
    assert source is None and list(found) == list(state)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_another_size_of_encoder_is_named(published: tuple[dict[str, Tensor], Path]) -> None:
    network = SwinUMambaD(spatial_dims=2, input_channels=1, num_classes=2, depths=(2, 2, 5, 2))
    message = refused(network, published[1])
    assert "extra: 52 (layers.2.blocks.5." in message and "published depths and features" in message


def test_layouts_agree_with_the_reference_files() -> None:
    """Where the description of the published files is at hand: key for key."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    manifest = json.loads((folder / "vmamba_tiny_v0_manifest.json").read_text())
    assert {k: tuple(v["shape"]) for k, v in manifest["tensors"].items()} == vmamba_tiny_shapes()
    layouts = json.loads((folder / "vmamba_v2_key_layouts.json").read_text())
    later = renamed({name: torch.empty(shape) for name, shape in vmamba_tiny_shapes().items()})
    assert {k: tuple(v) for k, v in layouts["v0 config in #v2cls code (renamed)"].items()} == {
        k: tuple(v.shape) for k, v in later.items()
    }
