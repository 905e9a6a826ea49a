"""What nnU-Net's user hears when a network starts: how it computes, and whether a training can end well."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.available import available_memory
from nnunetv2_lightnets.nnunet.memory import NOBODY, memory_of
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.ops.selective_scan.dispatch import (
    ENVIRONMENT_VARIABLE,
    FAST,
    ON_REQUEST,
    announced,
    fastest,
    forced_backend,
    refusal,
)
from nnunetv2_lightnets.ops.selective_scan.slow import slow_scan

MEMORY_CHECK = "NNUNET_LIGHTNETS_MEMORY_CHECK"
_GIGABYTE = 2**30
_CLOSE = 0.9  # of what there is: an estimate above may be too much
# Gigabytes that nnU-Net's planners plan for.
_TARGETS = {
    "ExperimentPlanner": 8,
    "nnUNetPlannerResEncM": 8,
    "nnUNetPlannerResEncL": 24,
    "nnUNetPlannerResEncXL": 40,
}
_KINDS = {"A_log": "plain", "A_logs": "directional"}  # the parameter of a network that scans, and how it does


def scan_backend(device: torch.device, kind: str = "plain") -> tuple[str, tuple[str, str] | None]:
    """The backend of a kind of scan on a device, and, if it is a slow one, what is to be said of it and the remedy.

    Raises:
        LightNetsError: the environment forces a backend that does not exist.
    """
    forced, fast = forced_backend(), FAST.get(device.type, ())
    if forced in (*fast, ON_REQUEST):
        return forced, None
    if forced:
        what = f"selective scan on {device.type}: backend {forced!r}, which is slow; it is forced"
        return forced, (what, f"unset {ENVIRONMENT_VARIABLE}")
    reasons = {name: refusal(name, kind, device) for name in fast}
    if found := [name for name in fast if reasons[name] is None]:
        return fastest(found, kind, device), None
    refusals = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return "torch", slow_scan(device, refusals or f"there is no faster one for {device.type}")


def scans(network: nn.Module) -> list[str]:
    """The kinds of selective scans in a network."""
    parameters = {name.rpartition(".")[2] for name, _ in network.named_parameters()}
    return [kind for name, kind in _KINDS.items() if name in parameters]


def scan_notice(network: nn.Module, device: torch.device) -> str | None:
    """Which backend computes the selective scans of a network, a warning if it is a slow one; None if it has none.

    Where the notice warns, the scans themselves do so no more.
    """
    named: dict[str, list[str]] = {}
    for kind in scans(network):
        name, slow = scan_backend(device, kind)
        announced(device, name)
        if slow is not None:
            return f"WARNING: {slow[0]}. Remedy: {slow[1]}; nnUNetv2_lightnets doctor checks it"
        named.setdefault(name, []).append(kind)
    if not named:
        return None
    how = " (forced)" if forced_backend() else ""
    return f"selective scan on {device.type}: " + ", ".join(
        f"backend {name!r}{how}" + (f" for {' and '.join(its)} scans" if len(named) > 1 else "")
        for name, its in named.items()
    )


class _Terminal(logging.Handler):
    """Writes warnings on lines of their own beside a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname}: {self.format(record)}", file=sys.stderr)


def show_warnings() -> None:
    """Show warnings of scans in the terminal, once they are given: nnU-Net sets up no log when it predicts."""
    logger = logging.getLogger("nnunetv2_lightnets")
    if not logger.hasHandlers():
        logger.addHandler(_Terminal(logging.WARNING))


def check_memory(trainer: Any, watch: AbstractContextManager[object] = NOBODY) -> str:
    """What a training step needs by estimate, and what can be had on the device, in a line for the log.

    The step is counted and not run, see :mod:`nnunetv2_lightnets.nnunet.memory`. Of several GPUs each looks at its own.

    Args:
        trainer: About to train.
        watch: Entered while the step is counted.

    Raises:
        LightNetsError: It does not fit; the remedy has the command that makes plans that do. Set
            ``NNUNET_LIGHTNETS_MEMORY_CHECK=off`` to have that as a warning in the line.
    """
    device: torch.device = trainer.device
    try:
        with torch.random.fork_rng(devices=[]):
            needed = memory_of(trainer, watch).total
        available = available_memory(device)
        # The network is there already, and the optimizer's state where a training continues.
        held = sum(x.untyped_storage().nbytes() for x in _held(trainer) if x.device == device)
    except Exception as error:  # an estimate must not stop a training
        return (
            f"the memory of a training step could not be estimated: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        )
    patch = " x ".join(map(str, trainer.configuration_manager.patch_size))
    step = (
        f"a training step on patches of {patch} with batch size {trainer.batch_size} takes about "
        f"{needed / _GIGABYTE:.1f} GB"
    )
    if available is None:
        return f"{step}; what {device.type} has is not known"
    available += held
    gigabytes = available / _GIGABYTE
    if needed <= _CLOSE * available:
        return f"{step}, and {device.type} has {gigabytes:.1f} GB"
    if needed <= available:
        return f"WARNING: {step}, and {device.type} has {gigabytes:.1f} GB, which may be too little"
    message = f"{step}, and {device.type} has {gigabytes:.1f} GB. {_remedy(trainer, gigabytes, needed / _GIGABYTE)}"
    if os.environ.get(MEMORY_CHECK, "").strip().lower() in ("off", "0", "false", "no"):
        return f"WARNING: {message}"
    raise LightNetsError(f"{message}. If the estimate is wrong, {MEMORY_CHECK}=off trains all the same")


def _held(trainer: Any) -> Iterator[torch.Tensor]:
    """What is on the device before the first step."""
    yield from trainer.network.parameters()
    yield from trainer.network.buffers()
    for state in trainer.optimizer.state.values():
        yield from (x for x in state.values() if torch.is_tensor(x))


def _remedy(trainer: Any, gigabytes: float, needed: float) -> str:
    """What to do where a step needs more than there is, with commands that can be typed."""
    plans, configuration = trainer.plans_manager, trainer.configuration_name
    number = re.match(r"Dataset0*(\d+)_", plans.dataset_name)
    dataset = number[1] if number else plans.dataset_name
    aim = max(0.1, math.floor(10 * _CLOSE * gigabytes) / 10)
    known = next((c.__name__ for c in type(trainer).__mro__ if c.__name__ in TRAINERS), None)
    if _planner_fits(trainer) and known is not None:
        words = ["nnUNetv2_lightnets", "plan", "-d", dataset, "-c", configuration, "-tr", known]
        if "network_strides" not in trainer.configuration_manager.network_arch_init_kwargs:  # else ours already
            words += ["-p", plans.plans_name]
        words += ["--memory", f"{aim:g}", "-device", trainer.device.type]
        commands = shlex.join([*words, "--suffix", f"{aim:g}GB".replace(".", "_")])
    else:  # nnU-Net's own plans fit these networks, and have a target in GB for its own network
        planner = plans.plans.get("experiment_planner_used", "ExperimentPlanner")
        present = re.search(r"_(\d+(?:\.\d+)?)GB$", plans.plans_name)
        target = float(present[1]) if present else _TARGETS.get(planner, _TARGETS["ExperimentPlanner"])
        target = max(0.1, math.floor(10 * target * aim / needed) / 10)
        name = f"{plans.plans_name[: present.start()] if present else plans.plans_name}_{target:g}GB"
        plan = ["nnUNetv2_plan_experiment", "-d", dataset, "-pl", planner, "-gpu_memory_target", f"{target:g}"]
        prepare = ["nnUNetv2_preprocess", "-d", dataset, "-plans_name", name, "-c", configuration]
        commands = f"{shlex.join([*plan, '-overwrite_plans_name', name])}, then {shlex.join(prepare)}"
    sizes = [name for name in TRAINERS if known and name in (f"{known}S", f"{known}T")] or [
        "nnUNetTrainerULite or nnUNetTrainerUltraLightUNet"
    ]
    return (
        f"Take a smaller network ({', '.join(sizes)}), or plans that fit ({commands}), "
        "or a smaller batch size in the plans"
    )


def _planner_fits(trainer: Any) -> bool:
    """Whether there is something to plan for its network, as ``nnUNetv2_lightnets plan`` sees it."""
    if type(trainer).n_downsamplings is not None:
        return True
    return "strides" not in trainer.planned_architecture(trainer.configuration_manager) and hasattr(
        trainer.bare_network, "stride"
    )
