"""Weights that the papers' authors released, or that were trained with their code, loaded into our networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """``"12 (a, b, c, ...)"``: how many names there are, and the first few of them."""
    names = list(names)
    return f"{len(names)} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"


def plain_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's state dict without its packing.

    Takes what a training's checkpoint has under ``network_weights``, or the mapping itself, and strips the prefixes
    that ``DistributedDataParallel`` and ``torch.compile`` put before every key, in whatever order they are nested.
    """
    state = checkpoint.get("network_weights", checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise LightNetsError(
            "the checkpoint holds no weights; expected a state dict, or a training's with one under 'network_weights'"
        )
    state = dict(state)
    while prefix := next((p for p in _WRAPPERS if all(str(key).startswith(p) for key in state)), None):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def load_official(network: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a checkpoint in the authors' key names into ``network``, completely or not at all.

    Args:
        network: a network of this package; its ``from_official`` maps the authors' names to ours.
        state_dict: the authors' state dict, or a training's checkpoint with it (``network_weights``).
            Tensors are cast to the network's dtype and moved to its device.

    Raises:
        LightNetsError: the network has no published weights, or keys are missing, unexpected, or of another shape.
            The network is then as it was.
    """
    name = type(network).__name__
    from_official = getattr(network, "from_official", None)
    if from_official is None:
        raise LightNetsError(f"{name} has no published weights to load; load its own state dict instead")
    try:
        state: Mapping[str, Any] = from_official(plain_state_dict(state_dict))
    except KeyError as error:
        raise LightNetsError(
            f"the checkpoint is not of the published {name}: it lacks {error}; check which network it was trained with"
        ) from error
    own = network.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "not a tensor": [key for key in own if key in state and not isinstance(state[key], Tensor)],
        "of another shape": [
            f"{key}: {tuple(state[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the network"
            for key in own
            if isinstance(state.get(key), Tensor) and state[key].shape != own[key].shape
        ],
    }
    found = "; ".join(f"{problem}: {first_few(keys)}" for problem, keys in problems.items() if keys)
    if found:
        raise LightNetsError(
            f"the checkpoint does not fit this {name}; {found}; "
            "build the network with the settings and channel counts the checkpoint was trained with"
        )
    network.load_state_dict(state, strict=True)
