"""Measures one network, in a process of its own: nothing another network did changes its memory or its speed.

``python -m nnunetv2_lightnets.costs.worker JOB.pkl ROW.json`` is how ``nnUNetv2_lightnets benchmark`` calls it.
"""

from __future__ import annotations

import copy
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunetv2_lightnets.costs.machine import machine
from nnunetv2_lightnets.costs.memory import Memory
from nnunetv2_lightnets.costs.trainers import find_trainer_class, trainer_costs
from nnunetv2_lightnets.files import write_atomically
from nnunetv2_lightnets.networks.counting import count_macs, count_parameters
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.malloc import nothing_kept
from nnunetv2_lightnets.nnunet.plans import Setting, patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import autocast, make_batch, make_trainer

_FEWEST, _MOST = 3, 50  # timed repetitions ...
_LONG = 10  # ... unless a single one takes so many times longer than is given to all


@dataclass(frozen=True)
class Job:
    """What to measure."""

    trainer: str
    setting: Setting
    batch_size: int  # patches of a training step
    volume: tuple[int, int, int] | None  # (slices, height, width) to predict as a whole
    device: str | None  # None takes cuda where there is one, else cpu
    threads: int | None  # of torch on the CPU; None for torch's own choice
    seconds: float  # for the repetitions of each measurement
    mirroring: bool  # of the whole volume, as nnU-Net does at test time
    claims: Sequence[dict[str, Any]] = ()  # published numbers to set ours beside, see claims.json


def main() -> None:
    """Measure the job in the file of the first argument, write the row into that of the second."""
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    with temporary_folders() as folder:
        row = measure(job, folder)
    write_atomically(sys.argv[2], json.dumps(row))


def measure(job: Job, folder: Path) -> dict[str, Any]:
    """A row of the benchmark: counts, seconds, bytes, and the machine; ``folder`` holds nnU-Net's folders, empty."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = torch.device(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trainer_class = find_trainer_class(job.trainer)
    return {
        **measure_prediction(trainer_class, job, device),
        **measure_training(trainer_class, job, folder, device),
        "claims": [check_claim(trainer_class, claim) for claim in job.claims],
        "machine": machine(device),
    }


def measure_prediction(trainer_class: type[Any], job: Job, device: torch.device) -> dict[str, Any]:
    """One patch, and a whole image, with the network as nnU-Net predicts."""
    memory = Memory(device)
    predicting = predictor(trainer_class, job, device)
    patch = torch.randn(1, job.setting.input_channels, *job.setting.patch, device=device)
    with torch.inference_mode(), autocast(device):
        measured = {"inference": measured_step(lambda: predicting.network(patch), job.seconds, memory)}
    if job.volume is not None:
        image = torch.randn(patch.shape[1], *job.volume)
        volume = measured_step(lambda: predicting.predict_sliding_window_return_logits(image), job.seconds, memory)
        measured["volume"] = volume | {"voxels": image[0].numel()}
    return measured


def measure_training(trainer_class: type[Any], job: Job, folder: Path, device: torch.device) -> dict[str, Any]:
    """A training step, and what there is to count in the network that is trained."""
    memory = Memory(device)
    trainer = make_trainer(trainer_class, job.setting, job.batch_size, folder, device)
    batch = make_batch(trainer, job.setting.patch, job.batch_size)
    trainer.network.train()
    training = measured_step(lambda: trainer.train_step(batch), job.seconds, memory, 2)  # it then has optimizer's state
    training["batch_size"] = job.batch_size
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    trainer.set_deep_supervision_enabled(False)
    return {
        "training": training,
        "network": type(network).__name__,
        "parameters": count_parameters(network),
        "macs": count_macs(network, trainer.num_input_channels, job.setting.patch),
        "compiled": network is not trainer.network,
        "deep_supervision": bool(trainer.enable_deep_supervision),
    }


def predictor(trainer_class: type[Any], job: Job, device: torch.device) -> Any:
    """nnU-Net's predictor with the trainer's network as it predicts."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(copy.deepcopy(job.setting.plans))
    configuration = plans.get_configuration(job.setting.configuration)
    outputs = plans.get_label_manager(job.setting.dataset_json).num_segmentation_heads
    network = trainer_class.build_network_architecture(plans, configuration, job.setting.input_channels, outputs, False)
    predicting = nnUNetPredictor(
        use_mirroring=job.mirroring,
        perform_everything_on_device=device.type == "cuda",
        device=device,
        verbose=False,
        allow_tqdm=False,
    )
    axes = tuple(range(len(job.setting.patch)))
    predicting.manual_initialization(
        network.to(device), plans, configuration, None, job.setting.dataset_json, job.trainer, axes
    )
    predicting.network.eval()
    return predicting


def measured_step(step: Callable[[], Any], seconds: float, memory: Memory, alone: int = 1) -> dict[str, Any]:
    """Memory that a step needs, and seconds that it takes: median and quartiles of repetitions.

    Memory is that of the first steps (``alone``), whose freed memory goes back to the system. In the repetitions it is
    kept, if there is enough, as in prediction and training.
    """

    def once() -> float:
        start = time.perf_counter()
        step()
        torch.get_device_module(memory.device).synchronize()
        return time.perf_counter() - start

    memory.start()
    with nothing_kept():
        *_, first = (once() for _ in range(alone))
        needed = memory.measured()
    if first > _LONG * seconds:  # one more, which is warm, is all there is time for
        runs = [once()]
    else:
        warm = once()
        runs = [once() for _ in range(max(_FEWEST, min(_MOST, int(seconds / max(warm, 1e-9)))))]
    low, median, high = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else runs * 3
    return {"median": median, "quartiles": [low, high], "runs": len(runs)} | needed


def check_claim(trainer_class: type[Any], claim: dict[str, Any]) -> dict[str, Any]:
    """A published number, and ours for the same input."""
    setting = patch_setting(claim["patch"], claim["channels"], claim["classes"])
    _, parameters, macs = trainer_costs(trainer_class, setting)
    return claim | {"ours": parameters if claim["quantity"] == "parameters" else macs}


if __name__ == "__main__":
    main()
