"""What all our trainers share, on top of nnU-Net's own trainer.

A recipe (``nnunetv2_lightnets/trainers``) names its network and states what its paper changes; everything else is
nnU-Net's. Where nnU-Net 2.8 leaves no hook its method is repeated here, and a contract test watches the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks import create_network, list_networks, network_entry
from nnunetv2_lightnets.nnunet.checkpoints import CheckpointTrainer
from nnunetv2_lightnets.nnunet.freezing import backward
from nnunetv2_lightnets.nnunet.malloc import give_back, reuse_freed_memory, reuse_freed_memory_on_cpu
from nnunetv2_lightnets.nnunet.notices import check_memory, scan_notice, scans, show_warnings
from nnunetv2_lightnets.nnunet.prediction import PredictionNetwork
from nnunetv2_lightnets.nnunet.schedules import Cosine, Poly
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.nnunet.warm_up import Calls, warm_up
from nnunetv2_lightnets.ops.selective_scan.dispatch import announced

# Under automatic mixed precision single steps may overflow: the gradient scaler skips them. A run of them is a fault.
MAX_SKIPPED_STEPS = 20
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


class LightNetsTrainer(CheckpointTrainer):
    """Base of all recipes: a recipe is a table of these attributes, of which nnU-Net's own values stand here."""

    network_name: ClassVar[str]  # in the registry
    network_kwargs: ClassVar[Mapping[str, Any]] = {}  # its architecture, where it differs from the network's defaults
    n_downsamplings: ClassVar[int | None] = None  # strides that are taken from the plan; None: the network's are fixed
    deep_supervision: ClassVar[bool] = False  # whether the network is trained at several resolutions
    initial_lr: float = 1e-2  # at the first epoch
    weight_decay: float = 3e-5  # of all parameters, as the optimizer means it
    optimizer_class: ClassVar[type[Any]] = torch.optim.SGD
    optimizer_kwargs: ClassVar[Mapping[str, Any]] = {"momentum": 0.99, "nesterov": True}  # stated with its class
    schedule: ClassVar[Poly | Cosine] = Poly()  # of the learning rate
    clip_norm: ClassVar[float] = 12.0  # largest norm of the gradient of what is trained

    @wraps(nnUNetTrainer.__init__)  # type: ignore[misc] # nnU-Net records what this signature names
    def __init__(self, plans: dict[str, Any], configuration: str, *args: Any, **kwargs: Any) -> None:
        self._refuse_what_cannot_work(plans, configuration)
        super().__init__(plans, configuration, *args, **kwargs)
        # nnU-Net's constructor has set its own values.
        self.initial_lr, self.weight_decay = type(self).initial_lr, type(self).weight_decay
        self.enable_deep_supervision = self.deep_supervision
        self._skipped_steps = 0
        self._named_scan_backend = False

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
        show_warnings()
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
        dims = len(configuration_manager.patch_size)
        if cls.n_downsamplings is not None:
            own = configuration_manager.network_arch_init_kwargs.get("network_strides")  # in plans of our planner
            pooling = [[1] * dims, *own] if own else configuration_manager.pool_op_kernel_sizes
            architecture["strides"] = strides_from_plan(pooling, cls.n_downsamplings)
        return create_network(
            cls.network_name,
            spatial_dims=dims,
            input_channels=num_input_channels,
            num_classes=num_output_channels,
            deep_supervision=enable_deep_supervision and cls.deep_supervision,
            **architecture,
        )

    @classmethod
    def planned_architecture(cls, configuration_manager: ConfigurationManager) -> dict[str, Any]:
        """What a recipe's network takes from the plan beside strides, as keywords of the network; nothing here."""
        return {}

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The recipe's optimizer on all parameters, and its schedule."""
        optimizer = self.optimizer_class(
            self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay, **self.optimizer_kwargs
        )
        return optimizer, self.schedule(optimizer, self.initial_lr, self.num_epochs)

    def initialize(self) -> None:
        """Build everything as nnU-Net does; the network is one that can be trained."""
        token = _building_for_training.set(True)
        try:
            super().initialize()
        finally:
            _building_for_training.reset(token)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, with the network as it will predict."""
        self._name_scan_backend()  # where nothing was trained before
        trained = self.network  # type: ignore[has-type]
        if trained is self.bare_network:  # a compiled or distributed network is fast enough, and stays
            self.network = _for_prediction(trained)
        hook = reuse_freed_memory_on_cpu(self.network) if self.device.type == "cpu" else None
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            if hook is not None:
                hook.remove()
                give_back()
            self.network = trained

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the network between its list of outputs and the finest alone.

        nnU-Net switches it on after every validation, also for trainers without deep supervision: those stay off.
        """
        self.bare_network.decoder.deep_supervision = enabled and self.enable_deep_supervision  # type: ignore[union-attr]

    def on_train_start(self) -> None:
        """Start as nnU-Net does, and write into the log what is trained, with what, and what memory a step needs.

        Raises:
            LightNetsError: there is too little memory for a step; no other process has been started yet.
        """
        if not self.was_initialized:
            self.initialize()
        calls = Calls()
        memory = self._checked_memory(calls)
        super().on_train_start()
        parameters = sum(p.numel() for p in self.bare_network.parameters())
        self.print_to_log_file(
            f"nnunetv2_lightnets {__version__}: {self.network_name} {dict(self.network_kwargs) or ''}, "
            f"{parameters:,} parameters, torch {torch.__version__}"
        )
        self._name_scan_backend()
        if self.local_rank == 0:
            self.print_to_log_file(memory)
        if self.device.type == "cuda" and len(calls):
            warm_up(calls, self.device, self.print_to_log_file if self.local_rank == 0 else lambda line: None)

    def _checked_memory(self, calls: Calls) -> str:
        """The line of :func:`check_memory`. Of several processes all stop if one of them has to."""
        refusal = None
        try:
            line = check_memory(self, calls)
        except LightNetsError as error:
            refusal = error
        if self.is_ddp:
            refused = torch.tensor(float(refusal is not None), device=self.device)
            torch.distributed.all_reduce(refused, torch.distributed.ReduceOp.MAX)
            if refused and refusal is None:
                refusal = LightNetsError("another process of this training has too little memory, and says how much")
        if refusal is not None:
            raise refusal
        return line

    def _name_scan_backend(self) -> None:
        """Write into the log, once and from one process, what computes the network's scans."""
        if self._named_scan_backend:
            return
        self._named_scan_backend = True
        if self.local_rank != 0:
            announced(self.device, "torch")
        elif scans(self.bare_network):
            if self.device.type == "cuda":
                self.print_to_log_file("checking the scan's GPU kernels, which are compiled the first time")
            self.print_to_log_file(scan_notice(self.bare_network, self.device))

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One training iteration: nnU-Net's own, but that frozen parameters get no gradient.

        Raises:
            LightNetsError: the loss or its gradient is not finite (under mixed precision: 20 times in a row).
        """
        if self.device.type == "cpu":
            reuse_freed_memory()
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        if isinstance(target, list):
            target = [t.to(self.device, non_blocking=True) for t in target]
        else:
            target = target.to(self.device, non_blocking=True)

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self.device.type == "cuda" else dummy_context():
            loss = self.loss(self.network(data), target)

        scaler = self.grad_scaler
        backward(loss if scaler is None else scaler.scale(loss), self.network, self.frozen_parameters())
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        if scaler is None:
            self._check_finite(loss, norm)  # before the step, which would spoil the weights
            self.optimizer.step()
        else:  # it steps only where the gradients are finite, so the check can wait until all work is queued
            scaler.step(self.optimizer)
            scaler.update()
            self._check_finite(loss, norm)
        return {"loss": loss.detach().cpu().numpy()}

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that do not move in the current epoch; a recipe that freezes a part names it here.

        It must be a function of ``current_epoch`` alone, so that a resumed training freezes what an uninterrupted one
        does. Frozen parameters count neither in the norm that is clipped nor in the optimizer's weight decay.
        """
        return []

    def _check_finite(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Stop before the weights are lost, or before epochs go by in which the gradient scaler skips every step."""
        if bool(torch.isfinite(loss.detach() + norm)):
            self._skipped_steps = 0
            return
        self._skipped_steps += 1
        if self.grad_scaler is None or self._skipped_steps >= MAX_SKIPPED_STEPS:
            resumable = any(Path(self.output_folder).glob("checkpoint_*.pth"))
            raise LightNetsError(
                f"the loss is {loss.item()} and the norm of its gradient is {norm.item()} in epoch "
                f"{self.current_epoch}; training stops before the weights are lost. Check the images for NaN or "
                f"extreme values{', then continue from the last checkpoint with --c' if resumable else ''}"
            )


def variant(base: type[LightNetsTrainer], suffix: str, **network_kwargs: Any) -> type[Any]:
    """The recipe ``base`` of the same file for a network of other settings; it must be assigned to this name."""
    namespace = {"__module__": base.__module__, "network_kwargs": {**base.network_kwargs, **network_kwargs}}
    return type(base.__name__ + suffix, (base,), namespace)


def with_budget(
    trainer: type[nnUNetTrainer], name: str, *, epochs: int | None, iterations: int | None
) -> type[nnUNetTrainer]:
    """A subclass of ``trainer`` called ``name`` that trains for other epochs, or iterations per epoch.

    Validation takes a fifth of the training iterations, as in nnU-Net (250 and 50). Short trainings are saved more
    often than every 50 epochs, so that an interruption costs at most a tenth of them.
    """

    @wraps(trainer.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        trainer.__init__(self, *args, **kwargs)
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
