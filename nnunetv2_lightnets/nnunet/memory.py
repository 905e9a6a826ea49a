"""Training memory of a network, counted on fake tensors: shapes and lifetimes are real, nothing is computed.

A whole training step is taken: forward pass, nnU-Net's loss at full resolution, backward pass, gradients. Whatever is
alive at the worst moment counts: tensors saved for the backward pass, gradients passing through it, parameters, their
gradients, the optimizer's state, the batch, the states that the selective scan keeps.

On a CPU a step is in float32. On CUDA it is in mixed precision: what is half there is counted so, with what the scan's
kernels allocate inside (see ``mixed_precision.py``; the fake tensors are the CPU's all the same, so that no GPU is
needed). Not counted is what CUDA and its libraries take for themselves, and what ``torch.compile`` saves.
"""

from __future__ import annotations

import contextlib
import copy
import io
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.mixed_precision import backward_under_cuda_rules, cuda_autocast
from nnunetv2_lightnets.nnunet.plans import Setting
from nnunetv2_lightnets.nnunet.rehearsal import make_targets, make_trainer
from nnunetv2_lightnets.ops import library
from nnunetv2_lightnets.ops.selective_scan import workspace

NOBODY = contextlib.nullcontext()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step takes."""

    fixed: int  # parameters and the optimizer's state, whatever the patch
    step: int  # the most that one step takes beside them: what is saved for the backward pass, gradients, the batch
    saved: int  # the part of step that is saved for the backward pass

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.fixed + self.step


def training_memory(
    trainer_class: type[Any], setting: Setting, batch_size: int, device: torch.device = CPU
) -> TrainingMemory:
    """Memory of one training step, counted without running it.

    Args:
        trainer_class: a trainer of ours, or nnU-Net's; its network, loss and optimizer are what is counted.
        setting: plans with patch size and strides, and the data set's description.
        batch_size: patches of a step.
        device: where it is to train; it need not be here.
    """
    with temporary_folders() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(trainer_class, setting, batch_size, folder, CPU)
    return step_memory(trainer, setting.patch, batch_size, device)


def memory_of(trainer: Any, watch: AbstractContextManager[object] = NOBODY) -> TrainingMemory:
    """Memory of one step of a trainer of ours that is about to train; it is left as it is.

    Args:
        trainer: initialized, on any device.
        watch: entered while the step is counted; a dispatch mode sees its operations.
    """
    rehearsed = copy.copy(trainer)
    rehearsed.device, rehearsed.is_ddp = CPU, False
    with torch.device("meta"):
        rehearsed.network = trainer.trained_network(
            trainer.configuration_manager,
            trainer.num_input_channels,
            trainer.label_manager.num_segmentation_heads,
            trainer.enable_deep_supervision,
        )
    rehearsed.optimizer, _ = rehearsed.configure_optimizers()
    rehearsed.loss = rehearsed._build_loss()
    patch = trainer.configuration_manager.patch_size
    return step_memory(rehearsed, patch, trainer.batch_size, trainer.device, watch)


def step_memory(
    trainer: Any,
    patch: Sequence[int],
    batch_size: int,
    device: torch.device = CPU,
    watch: AbstractContextManager[object] = NOBODY,
) -> TrainingMemory:
    """Memory of one step of this trainer, which cannot be used afterwards.

    Args:
        trainer: initialized, on a CPU; its network may be on the meta device, which has no memory.
        patch: voxels along each axis.
        batch_size: patches of a step.
        device: where the step is to run; mixed precision on CUDA.
        watch: entered while the step is counted.
    """
    on_gpu = device.type == "cuda"
    state_bytes = sum(p.numel() for p in trainer.network.parameters()) * _state_per_weight(trainer.optimizer)
    mode, live = FakeTensorMode(), _LiveBytes(on_gpu)
    with mode:
        _make_fake(trainer.network)
    with mode, live, watch:
        weight_bytes = sum(t.untyped_storage().nbytes() for t in trainer.network.state_dict().values())
        outside = live.bytes
        data = torch.empty(batch_size, trainer.num_input_channels, *patch)
        trainer.network.train()
        live.peak = live.bytes
        saved = _SavedBytes()
        with saved, cuda_autocast() if on_gpu else NOBODY:
            answers = trainer.network(data)
            targets = make_targets(trainer, answers, batch_size)
            loss = trainer.loss(answers, targets)
            del answers  # as in our training step
        if on_gpu:
            backward_under_cuda_rules(loss)
        else:
            loss.backward()
    return TrainingMemory(fixed=weight_bytes + state_bytes, step=live.peak - outside, saved=saved.bytes)


def _make_fake(network: nn.Module) -> None:
    """Replace parameters and buffers by fake ones; the real ones are freed. A shared one stays shared."""
    fake: dict[torch.Tensor, torch.Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in fake:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fake[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = fake[tensor]  # type: ignore[assignment]


def _state_per_weight(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimizer keeps for each weight, seen from a step on a few; it loses all others."""
    weights = nn.Parameter(torch.zeros(64))
    weights.grad = torch.zeros(64)
    optimizer.param_groups = [optimizer.param_groups[0] | {"params": [weights]}]
    optimizer.step()
    kept = [v for v in optimizer.state[weights].values() if torch.is_tensor(v) and v.shape == weights.shape]
    return sum(value.element_size() for value in kept)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages alive, and the most there ever were.

    Args:
        on_gpu: whether to count what the scan's kernels on GPUs take inside.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_gpu = on_gpu
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a number that steers the loss; fake tensors have none
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes + self._inside(func, args))
        return out

    def _inside(self, func: Any, args: Any) -> int:
        """Bytes that an operator of ours takes while it runs."""
        if func.namespace != library.NAMESPACE:
            return 0
        name = func.__name__.partition(".")[0]
        if name in library.WORKSPACE:
            return int(library.WORKSPACE[name](*args, **({"device": "cuda"} if self._on_gpu else {})))
        return int(workspace.OPERATORS[name](*args)) if self._on_gpu and name in workspace.OPERATORS else 0

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.bytes -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.bytes += size


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages saved for the backward pass, each once; parameters are among them."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes counted so far."""
        return sum(self._sizes.values())
