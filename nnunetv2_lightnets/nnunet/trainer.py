"""What all our trainers share, on top of nnU-Net's own trainer.

A recipe (``nnunetv2_lightnets/trainers``) names its network and states what its paper changes; everything else is
nnU-Net's. Where nnU-Net 2.8 leaves no hook its method is repeated here, and a contract test watches the original.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks import create_network, list_networks, network_entry
from nnunetv2_lightnets.nnunet.freezing import backward
from nnunetv2_lightnets.nnunet.malloc import reuse_freed_memory, reuse_freed_memory_on_cpu
from nnunetv2_lightnets.nnunet.prediction import PredictionNetwork
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS

# Under automatic mixed precision single steps may overflow: the gradient scaler skips them. A run of them is a fault.
MAX_SKIPPED_STEPS = 20
_RNG = "lightnets_rng"
# nnU-Net builds networks for training and for prediction through one method, and does not say which it wants.
_building_for_training: ContextVar[bool] = ContextVar("building_for_training", default=False)


def strides_from_plan(
    pool_op_kernel_sizes: Sequence[Sequence[int]], n_downsamplings: int
) -> tuple[tuple[int, ...], ...]:
    """Per-axis strides of a network with ``n_downsamplings``, as nnU-Net planned them for this data.

    nnU-Net does not pool an axis that is short or coarsely sampled. Its first ``n_downsamplings`` are taken (the
    first entry of a plan is the input's own resolution); where the plan has fewer, the rest do not pool.
    """
    planned = [tuple(stride) for stride in pool_op_kernel_sizes[1 : n_downsamplings + 1]]
    no_pooling = (1,) * len(pool_op_kernel_sizes[0])
    return tuple(planned + [no_pooling] * (n_downsamplings - len(planned)))


def _pooling(configuration: ConfigurationManager) -> Sequence[Sequence[int]]:
    """Per-axis pooling of a plan, from the input's own resolution on; our planner writes it under a name of its own."""
    own = configuration.network_arch_init_kwargs.get("network_strides")
    pooling: Sequence[Sequence[int]] = configuration.pool_op_kernel_sizes
    return pooling if own is None else [[1] * len(own[0]), *own]


class LightNetsTrainer(nnUNetTrainer):
    """Base of all recipes.

    Attributes:
        network_name: the network's name in the registry.
        network_kwargs: its architecture, where it differs from the network's own defaults.
        n_downsamplings: how many strides the network takes from the plan; None if its strides are fixed.
        deep_supervision: whether the network is trained at several resolutions.
        clip_norm: largest norm of the gradient of what is trained (nnU-Net's own value).
    """

    network_name: ClassVar[str]
    network_kwargs: ClassVar[Mapping[str, Any]] = {}
    n_downsamplings: ClassVar[int | None] = None
    deep_supervision: ClassVar[bool] = False
    clip_norm: ClassVar[float] = 12.0

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        self._refuse_what_cannot_work(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = self.deep_supervision
        self._skipped_steps = 0
        self._rng_to_restore: dict[str, Any] | None = None

    @classmethod
    def _refuse_what_cannot_work(cls, plans: dict[str, Any], configuration: str) -> None:
        """Raise before anything is written to disk."""
        if configuration not in plans["configurations"]:
            raise LightNetsError(
                f"configuration {configuration!r} is not in the plans {plans['plans_name']!r} of "
                f"{plans['dataset_name']}, which have: {', '.join(plans['configurations'])}"
            )
        dims = len(PlansManager(plans).get_configuration(configuration).patch_size)
        if dims not in network_entry(cls.network_name).spatial_dims:
            # The first trainer in a file is its network's own; the rest are sizes and controls.
            first = {network: trainer for trainer, network in reversed(TRAINERS.items())}
            others = ", ".join(first[network] for network in list_networks(dims) if network in first)
            raise LightNetsError(
                f"{cls.__name__} cannot train {configuration}: {cls.network_name} does not exist in {dims}D; "
                f"trainers that can: {others}"
            )

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network, for training or, when nnU-Net's predictor calls this, for prediction.

        A network for prediction computes the same with fewer steps, where it knows how; its state dict is the same.
        """
        network = cls.trained_network(
            configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        if _building_for_training.get():
            return network
        network = _for_prediction(network)
        reuse_freed_memory_on_cpu(network)
        return network

    @classmethod
    def trained_network(
        cls,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network as it is trained, for the patch and strides of a plan."""
        architecture = {**cls.network_kwargs, **cls.planned_architecture(configuration_manager)}
        if cls.n_downsamplings is not None:
            architecture["strides"] = strides_from_plan(_pooling(configuration_manager), cls.n_downsamplings)
        return create_network(
            cls.network_name,
            spatial_dims=len(configuration_manager.patch_size),
            input_channels=num_input_channels,
            num_classes=num_output_channels,
            deep_supervision=enable_deep_supervision and cls.deep_supervision,
            **architecture,
        )

    @classmethod
    def planned_architecture(cls, configuration_manager: ConfigurationManager) -> dict[str, Any]:
        """What a recipe's network takes from the plan beside strides, as keywords of the network; nothing here."""
        return {}

    def initialize(self) -> None:
        """Build everything as nnU-Net does; the network is one that can be trained."""
        token = _building_for_training.set(True)
        try:
            super().initialize()
        finally:
            _building_for_training.reset(token)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, with the network as it will predict."""
        if self.device.type == "cpu":
            reuse_freed_memory()
        trained = self.network  # type: ignore[has-type]
        if trained is self.bare_network:  # a compiled or distributed network is fast enough, and stays
            self.network = _for_prediction(trained)
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.network = trained

    @property
    def bare_network(self) -> nn.Module:
        """The network itself, without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        return getattr(network, "_orig_mod", network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the network between its list of outputs and the finest alone.

        nnU-Net switches it on after every validation, also for trainers without deep supervision: those stay off.
        """
        self.bare_network.decoder.deep_supervision = enabled and self.enable_deep_supervision  # type: ignore[union-attr]

    def on_train_start(self) -> None:
        """Start as nnU-Net does, and write into the log what is trained and with what."""
        super().on_train_start()
        parameters = sum(p.numel() for p in self.bare_network.parameters())
        self.print_to_log_file(
            f"nnunetv2_lightnets {__version__}: {self.network_name} {dict(self.network_kwargs) or ''}, "
            f"{parameters:,} parameters, torch {torch.__version__}"
        )

    def on_epoch_start(self) -> None:
        """Start an epoch; the first one after a resume goes on with the random numbers where the last one stopped."""
        if self._rng_to_restore is not None:
            _set_rng_state(self._rng_to_restore)
            self._rng_to_restore = None
        super().on_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One training iteration: nnU-Net's own, but that frozen parameters get no gradient.

        Raises:
            LightNetsError: if the loss is not finite (under mixed precision: for 20 iterations in a row).
        """
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        if isinstance(target, list):
            target = [t.to(self.device, non_blocking=True) for t in target]
        else:
            target = target.to(self.device, non_blocking=True)

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self.device.type == "cuda" else dummy_context():
            loss = self.loss(self.network(data), target)
        self._check_finite(loss)

        if self.grad_scaler is not None:
            backward(self.grad_scaler.scale(loss), self.network, self.frozen_parameters())
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            backward(loss, self.network, self.frozen_parameters())
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
            self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that do not move in the current epoch; a recipe that freezes a part names it here.

        It must be a function of ``current_epoch`` alone, so that a resumed training freezes what an uninterrupted one
        does. Frozen parameters count neither in the norm that is clipped nor in the optimizer's weight decay.
        """
        return []

    def _check_finite(self, loss: torch.Tensor) -> None:
        if bool(torch.isfinite(loss)):
            self._skipped_steps = 0
            return
        self._skipped_steps += 1
        if self.grad_scaler is None or self._skipped_steps >= MAX_SKIPPED_STEPS:
            raise LightNetsError(
                f"the loss is {loss.item()} in epoch {self.current_epoch}; training stops before the weights are "
                f"lost. Continue from the last checkpoint with --c, and check the images for NaN or extreme values"
            )

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint so that an interruption, at any moment, leaves the previous one whole.

        Beside nnU-Net's entries it holds the states of the random number generators.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
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
            _RNG: _rng_state(),
        }
        partial = f"{filename}.partial"
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, filename)
        except (OSError, RuntimeError) as error:
            # torch.save closes its archive even when a write has failed, and this second failure is what arrives.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise LightNetsError(
                f"checkpoint {filename} could not be written: {reason.strerror or reason}; the previous one is kept. "
                f"Free some space and go on with --c"
            ) from error
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load nnU-Net's checkpoint and, when training goes on, the random numbers where it stopped.

        Raises:
            LightNetsError: if the file cannot be read.
        """
        try:
            super().load_checkpoint(filename_or_checkpoint)
            checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", mmap=True, weights_only=False)
        except (OSError, EOFError, RuntimeError) as error:
            if "size mismatch" in str(error) or "Missing key" in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise LightNetsError(
                f"checkpoint {filename_or_checkpoint} cannot be read ({reason}); it is damaged: move it away, then "
                f"--c goes on from the next older one (checkpoint_latest.pth, then checkpoint_best.pth)"
            ) from error
        self._rng_to_restore = checkpoint.get(_RNG)


def with_budget(
    trainer: type[nnUNetTrainer], name: str, *, epochs: int | None, iterations: int | None
) -> type[nnUNetTrainer]:
    """A subclass of ``trainer`` called ``name`` that trains for other epochs, or iterations per epoch.

    Validation takes a fifth of the training iterations, as in nnU-Net (250 and 50). Short trainings are saved more
    often than every 50 epochs, so that an interruption costs at most a tenth of them.
    """

    def __init__(
        self: Any,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        trainer.__init__(self, plans, configuration, fold, dataset_json, device)
        if epochs is not None:
            self.num_epochs = epochs
            self.save_every = max(1, min(self.save_every, epochs // 10))
        if iterations is not None:
            self.num_iterations_per_epoch = iterations
            self.num_val_iterations_per_epoch = max(1, iterations // 5)

    return type(name, (trainer,), {"__init__": __init__, "__doc__": f"{trainer.__name__} with another budget."})


def _for_prediction(network: nn.Module) -> nn.Module:
    """The network made ready for prediction, if its class knows how to do that exactly."""
    return PredictionNetwork(network) if hasattr(network, "prepare_for_inference_") else network


def _rng_state() -> dict[str, Any]:
    """States of all generators that training draws from, in types that torch.save takes."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (the generator nnU-Net's data loading draws from)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
