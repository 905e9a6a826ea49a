"""nnU-Net's checkpoints: written whole or not at all, and with the random numbers that an exact resume needs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import atomic_file, is_damaged, last_line

_RNG = "lightnets_rng"


def bare(network: nn.Module) -> nn.Module:
    """A network without the wrappers of DDP and torch.compile."""
    inside = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    found: nn.Module = getattr(inside, "_orig_mod", inside)
    return found


class CheckpointTrainer(nnUNetTrainer):
    """nnU-Net's trainer, with checkpoints that survive an interruption, and from which training goes on exactly."""

    _rng_to_restore: dict[str, Any] | None = None

    @property
    def bare_network(self) -> nn.Module:
        """The network itself, without the wrappers of DDP and torch.compile."""
        return bare(self.network)

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint so that an interruption, at any moment, leaves the previous one whole.

        Beside nnU-Net's entries it holds the states of the random number generators, those of each rank. In a
        distributed training all ranks must call this at the same time, as nnU-Net does.

        Raises:
            LightNetsError: the file could not be written.
        """
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        states = random_states(self.device)
        if self.local_rank != 0:
            return
        checkpoint = {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            _RNG: states,
        }
        try:
            with atomic_file(filename) as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            # torch.save closes its archive even when a write has failed, and this second failure is what arrives.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise LightNetsError(
                f"checkpoint {filename} could not be written: {reason.strerror or reason}; the previous one is kept. "
                f"Free some space and go on with --c"
            ) from error

    def load_checkpoint(
        self, filename_or_checkpoint: str | dict[str, Any] | None = None, checkpoint: str | dict[str, Any] | None = None
    ) -> None:
        """Load nnU-Net's checkpoint and, when training goes on, the random numbers where it stopped.

        Args:
            filename_or_checkpoint: a file, or what is in it.
            checkpoint: the same; releases of nnU-Net after 2.8 call it so.

        Raises:
            LightNetsError: the file is damaged, or it is of another network.
        """
        source: Any = filename_or_checkpoint if checkpoint is None else checkpoint
        try:
            super().load_checkpoint(source)
        except LightNetsError:
            raise
        except Exception as error:
            if (reason := self._why_it_fails(source)) is not None:
                raise LightNetsError(reason) from error
            raise  # the file is in order: the GPU may have no memory left, for example
        # With mmap the weights are not read a second time.
        read = source if isinstance(source, dict) else torch.load(source, "cpu", mmap=True, weights_only=False)
        self._rng_to_restore = own_random_state(read.get(_RNG), self.local_rank)

    def _why_it_fails(self, source: str | dict[str, Any]) -> str | None:
        """What is wrong with a checkpoint that could not be loaded, and the remedy; None if nothing is."""
        try:
            checkpoint = source if isinstance(source, dict) else torch.load(source, "cpu", weights_only=False)
        except Exception as error:
            if not is_damaged(error):
                return None
            return (
                f"checkpoint {source} cannot be read ({last_line(error)}); it is damaged: move it away, then --c goes "
                f"on from the next older one (checkpoint_latest.pth, then checkpoint_best.pth)"
            )
        what = "the checkpoint" if isinstance(source, dict) else f"checkpoint {source}"
        if not isinstance(checkpoint, dict) or not {"network_weights", "init_args"} <= checkpoint.keys():
            return f"{what} is none of an nnU-Net training: it has no network_weights or init_args"
        if not self.was_initialized:
            return None
        difference = first_difference(checkpoint["network_weights"], self.bare_network.state_dict())
        if difference is None:
            return None
        made = checkpoint["init_args"]
        theirs = _title(checkpoint.get("trainer_name"), made["plans"], made["configuration"], made["dataset_json"])
        ours = _title(type(self).__name__, self.plans_manager.plans, self.configuration_name, self.dataset_json)
        return (
            f"{what} is of another network, {theirs}; this training is {ours}: {difference}. Go on with the trainer, "
            f"plans, configuration and labels that it was made with"
        )

    def on_epoch_start(self) -> None:
        """Start an epoch; the first one after a resume goes on with the random numbers where the last one stopped."""
        if self._rng_to_restore is not None:
            restore_random_state(self._rng_to_restore, self.device)
            self._rng_to_restore = None
        super().on_epoch_start()


def _title(trainer: str | None, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> str:
    return f"{trainer} ({plans['plans_name']}, {configuration}, {len(dataset_json['labels'])} labels)"


def first_difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """The first weight by which two networks differ, in words; None if all have the same names and shapes.

    Names may begin with DataParallel's ``module.``, as nnU-Net allows.
    """
    shapes = {key.removeprefix("module."): tuple(tensor.shape) for key, tensor in theirs.items()}
    for key, tensor in ours.items():
        if key not in shapes:
            return f"{key} is not in the checkpoint"
        if shapes[key] != tuple(tensor.shape):
            return f"{key} is {shapes[key]} in the checkpoint and {tuple(tensor.shape)} here"
    return next((f"{key} of the checkpoint is not in the network" for key in shapes if key not in ours), None)


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """States of all generators that training draws from, of every rank in order; types that torch.save takes.

    In a distributed training this is an exchange in which all ranks take part.
    """
    own = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (the generator nnU-Net's data loading draws from)
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def own_random_state(states: Any, rank: int) -> dict[str, Any] | None:
    """What a checkpoint has for this rank; None if nothing: such a rank goes on with fresh random numbers.

    That is so in a checkpoint of nnU-Net's own trainer, in one of fewer ranks, and on all ranks but the first in
    older checkpoints, which hold the state of the first alone.
    """
    if isinstance(states, dict):
        states = [states]
    return states[rank] if states and rank < len(states) else None


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set all generators as they were in one entry of :func:`random_states`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
