"""ImageNet weights of VMamba-Tiny: read safely, checked, and loaded into the encoders of Swin-UMamba.

Source: VMamba (Liu et al., arXiv:2401.10166v1), https://github.com/MzeroMiko/VMamba, MIT licence. The checkpoint is
the first version's ("v0"); its layout is :func:`vmamba_tiny_shapes`. Later VMamba code saves the same weights under
other names, which are understood, and has other architectures ("v05", "v2"), which are not.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks import create_network
from nnunetv2_lightnets.pretrained.cache import VMAMBA_CHECKPOINT, check_file, two_ways_out, vmamba_path
from nnunetv2_lightnets.pretrained.official import first_few, plain_state_dict

STATE_SIZE = 16  # of VMamba v0; v05 and v2 have 1
NOT_ENCODER = ("patch_embed.", "norm.", "head.")  # may stay unused: another stem, the classifier
SMALLEST_SHARE = 0.99  # of the encoder's elements

# What later VMamba code calls the same tensors.
_RENAMED = (
    (re.compile(r"^patch_embed\.0\."), "patch_embed.proj."),
    (re.compile(r"^patch_embed\.2\."), "patch_embed.norm."),
    (re.compile(r"^classifier\.(norm|head)\."), r"\1."),
    (re.compile(r"(\.blocks\.\d+)\.norm\."), r"\1.ln_1."),
    (re.compile(r"(\.blocks\.\d+)\.op\."), r"\1.self_attention."),
)
# The first uploads of the checkpoint also held the training's configuration, a yacs CfgNode. Under this name the
# unpickler makes a plain OrderedDict of it, so yacs is neither needed nor run.
_YACS_CONFIG = type("CfgNode", (), {"__new__": lambda cls: OrderedDict(), "__module__": "yacs.config"})


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_vmamba` did. Its text is one line for the training's log."""

    path: Path
    sha256: str
    source: str | None  # where the file says it was converted from
    tensors: int  # loaded into the network
    encoder_share: float  # of the encoder's elements that were loaded, 0..1
    adapted: tuple[str, ...]  # what was changed to fit, e.g. to another number of input channels

    def __str__(self) -> str:
        origin = f", from {self.source}" if self.source else ""
        adapted = f"; adapted: {', '.join(self.adapted)}" if self.adapted else ""
        return (
            f"ImageNet weights of VMamba: {self.tensors} tensors, {self.encoder_share:.2%} of the encoder, loaded from "
            f"{self.path} (SHA-256 {self.sha256}{origin}){adapted}"
        )


@cache
def vmamba_tiny_shapes() -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint: 212 tensors, 22,893,448 parameters, all float32."""
    # Swin-UMamba†'s encoder is VMamba-Tiny; what follows is the norm and the classifier that come after it.
    with torch.device("meta"):
        network: Any = create_network("swin_umamba_d", spatial_dims=2, input_channels=3, num_classes=2)
    own = network.state_dict()
    shapes = {key: tuple(own[target].shape) for key, target in network.vmamba_keys().items()}
    return shapes | {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}


def read_vmamba(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """Read a VMamba checkpoint of the first version (v0) without running anything in it.

    Args:
        path: a ``.pth`` as VMamba saves it (read with ``weights_only=True``), or ``.safetensors``; which of the two
            is told by the content.

    Returns:
        Tensors on the CPU by their v0 names, whichever of the two layouts the file has; and where the file says it
        was converted from, if it does.

    Raises:
        LightNetsError: no such file, an HTML page, truncated, damaged, a pickle that asks for more than tensors,
            another VMamba (v05, v2), no VMamba at all, or values that are not finite. Each has its own message.
    """
    path = Path(path)
    if not path.is_file():
        expected = "" if path == vmamba_path() else f" (kept at {vmamba_path()})"
        raise LightNetsError(f"there are no ImageNet weights at {path}; {two_ways_out()}{expected}")
    with path.open("rb") as file:
        start = file.read(1024)
    if is_html(start):
        raise LightNetsError(
            f"{path} is an HTML page, not a checkpoint: a login or proxy page was saved instead of the download; "
            f"delete it, then {two_ways_out()}"
        )
    source = None
    if start.startswith(b"PK\x03\x04"):
        checkpoint = _read_zip(path)
    elif start[8:9] == b"{":  # after the header's length
        checkpoint, source = _read_safetensors(path)
    else:
        raise LightNetsError(
            f"{path} ({path.stat().st_size:,} bytes) is neither a PyTorch checkpoint (1.6 or later) nor a safetensors "
            f"file; {two_ways_out()}"
        )
    if isinstance(checkpoint, Mapping):
        checkpoint = checkpoint.get("model", checkpoint)
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise LightNetsError(f"{path} holds no weights (no 'model' with tensors in it); {two_ways_out()}")
    state = plain_state_dict(checkpoint)
    if others := [str(key) for key, value in state.items() if not (isinstance(key, str) and _is_plain(value))]:
        raise LightNetsError(
            f"{path} is no VMamba checkpoint: not tensors of plain numbers: {first_few(others)}; {two_ways_out()}"
        )
    state = _to_v0_names(state, path)
    if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise LightNetsError(f"{path} holds NaN or infinity in {first_few(broken)}; it is damaged; {two_ways_out()}")
    return state, source


def _is_plain(value: object) -> bool:
    """Whether this is a tensor of floating-point numbers, not sparse, quantised or without values."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (
        isinstance(value, Tensor)
        and value.dtype in floats
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def is_html(start: bytes) -> bool:
    """Whether a file that starts so is a web page."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--"))


def _read_zip(path: Path) -> Any:
    try:
        whole = zipfile.is_zipfile(path)  # the table of contents is at the end
    except zipfile.BadZipFile:
        whole = True  # but damaged: torch will say so
    if not whole:
        raise LightNetsError(
            f"{path} is truncated: it ends after {path.stat().st_size:,} bytes, within the checkpoint; delete it, "
            f"then {two_ways_out()}"
        )
    try:
        with torch.serialization.safe_globals([_YACS_CONFIG]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked is None:
            raise LightNetsError(f"{path} is damaged: its pickle cannot be read; {two_ways_out()}") from error
        raise LightNetsError(
            f"{path} asks to run {asked[1]} when it is read, as a checkpoint of tensors never does; nothing of it was "
            f"run; do not use this file, and {two_ways_out()}"
        ) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise LightNetsError(f"{path} is damaged ({reason}); delete it, then {two_ways_out()}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get("source")  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise LightNetsError(f"{path} is truncated or damaged ({error}); delete it, then {two_ways_out()}") from error


def _to_v0_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    state_sizes = {tensor.shape[-1] if tensor.ndim else 0 for key, tensor in state.items() if key.endswith(".A_logs")}
    if not state_sizes:
        raise LightNetsError(
            f"{path} is no VMamba checkpoint: none of its keys ends in A_logs, they are {first_few(state)}; "
            f"{two_ways_out()}"
        )
    if state_sizes != {STATE_SIZE} or any(".mlp.fc1." in k or k.startswith("patch_embed.5.") for k in state):
        sizes = ", ".join(map(str, sorted(state_sizes)))
        raise LightNetsError(
            f"{path} is a checkpoint of a later VMamba (v05 or v2: state size {sizes}, other blocks), which cannot be "
            f"converted; Swin-UMamba starts from the first version's {VMAMBA_CHECKPOINT}; {two_ways_out()}"
        )
    renamed = {}
    for key, tensor in state.items():
        for pattern, name in _RENAMED:
            key = pattern.sub(name, key)
        renamed[key] = tensor
    return renamed


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], may_be_extra: tuple[str, ...] = ()
) -> str:
    """What keeps ``state`` from being ``expected`` (name to shape), in words; empty if nothing does.

    Keys that begin with one of ``may_be_extra`` are not counted as extra.
    """
    problems = {
        "missing": [key for key in expected if key not in state],
        "extra": [key for key in state if key not in expected and not key.startswith(may_be_extra)],
        "of another shape": [
            f"{key}: {tuple(state[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    return "; ".join(f"{problem}: {first_few(keys)}" for problem, keys in problems.items() if keys)


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Make a first convolution's weights (out, 3, kh, kw), trained on RGB, take ``channels`` channels.

    One channel takes the sum over red, green and blue: the output for a grey image is then that of the trained
    weights for the same image in RGB. Several channels take red, green, blue, red, ... in turn, times 3 / channels,
    so that the output keeps its size if all channels are equal.

    Returns:
        (out, channels, kh, kw).
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    in_turn = torch.arange(channels, device=weight.device) % weight.shape[1]
    return weight[:, in_turn] * (weight.shape[1] / channels)


def load_vmamba(network: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Start the encoder of ``network`` from ImageNet weights of VMamba, completely or not at all.

    Args:
        network: ``swin_umamba`` or ``swin_umamba_d``, not wrapped. Its ``vmamba_keys()`` says which tensor of the
            checkpoint goes where. ``swin_umamba`` takes 204: its own stem precedes the encoder, so nothing of
            the checkpoint's ``patch_embed`` fits (the authors' loader takes its ``norm.bias`` by mistake, a bias
            learned behind a convolution that is not there). ``swin_umamba_d`` takes 208; with other than 3 input
            channels the first convolution is adapted (:func:`adapt_input_channels`), and the report says so.
        path: ``.safetensors`` or ``.pth``, see :func:`read_vmamba`; :func:`vmamba_path` is where
            ``nnUNetv2_lightnets weights`` puts it. If a record lies beside it, the file must be as recorded.

    Returns:
        What was loaded, from where.

    Raises:
        LightNetsError: as :func:`read_vmamba`; the file is not the one recorded; keys are missing, extra or of
            another shape; or less than 99 % of the encoder's elements would be loaded. The network is then as it was.
    """
    path = Path(path)
    name = type(network).__name__
    vmamba_keys = cast("Callable[[], Mapping[str, str]] | None", getattr(network, "vmamba_keys", None))
    if vmamba_keys is None:
        raise LightNetsError(f"{name} has no VMamba encoder to load; networks that do: swin_umamba, swin_umamba_d")
    state, source = read_vmamba(path)
    sha256 = check_file(path)

    targets, own = vmamba_keys(), network.state_dict()
    adapted = []
    stem = "patch_embed.proj.weight"
    if stem in targets and stem in state:
        before, after = state[stem].shape, own[targets[stem]].shape
        if before[1] != after[1] and (before[0], *before[2:]) == (after[0], *after[2:]):
            state[stem] = adapt_input_channels(state[stem], after[1])
            adapted.append(f"{targets[stem]} from {before[1]} to {after[1]} input channels")
    expected = {key: tuple(own[target].shape) for key, target in targets.items()}
    if problems := compare_shapes(expected, state, may_be_extra=NOT_ENCODER):
        raise LightNetsError(
            f"{path} does not fit the encoder of this {name}; {problems}; take VMamba-Tiny's {VMAMBA_CHECKPOINT} "
            "for the published depths and features"
        )
    share = _encoder_share(set(targets.values()), own)
    if share < SMALLEST_SHARE:
        raise LightNetsError(
            f"{path} covers only {share:.1%} of the encoder of this {name}, less than {SMALLEST_SHARE:.0%}; "
            "build the network with the published depths and features"
        )
    with torch.no_grad():
        for key, target in targets.items():
            own[target].copy_(state[key])  # in place: these are the network's own tensors
    return LoadReport(path, sha256, source, len(targets), share, tuple(adapted))


def _encoder_share(loaded: set[str], own: Mapping[str, Tensor]) -> float:
    """Share of the elements that will be loaded, of those in the module that holds all of ``loaded``."""
    columns = zip(*(key.split(".") for key in loaded), strict=False)
    encoder = "".join(f"{next(iter(parts))}." for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    elements = {key: tensor.numel() for key, tensor in own.items() if key.startswith(encoder)}
    return sum(elements[key] for key in loaded) / sum(elements.values())
