"""How the memory of a process grows in which a network is trained, or predicts; each has a process of its own.

Processes are forked from one that has imported all. Networks are small, so that steps are short; what they keep of a
patch is not, so that a single tensor kept at each step is seen.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from nnunetv2_lightnets.costs.worker import Job, predictor
from nnunetv2_lightnets.networks import monai_baselines
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.plans import Setting, patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer
from nnunetv2_lightnets.trainers import find_trainer

SIDE = 48
CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "lightm_unet": {"width": 16, "blocks_down": (1, 1, 1, 1)},
    "swin_umamba": {"features": (16, 32, 64, 128, 256), "depths": (1, 1, 1, 1)},
    "swin_umamba_d": {"features": (32, 64, 128, 256), "depths": (1, 1, 1, 1)},
}
NARROW: dict[str, dict[str, Any]] = {  # what MONAI is asked for
    "SegResNet": {"init_filters": 16, "blocks_down": (1, 1, 1, 1)},
    "UNETR": {"feature_size": 16, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4},
    "SwinUNETR": {"feature_size": 12},
}

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["nnunetv2_lightnets.costs.worker", "nnunetv2.run.run_training", "monai.networks.nets"])


def growth(prepare: Callable[[str], Callable[[int], Any]], name: str, first: int, last: int) -> float:
    """Memory after ``last`` calls of what ``prepare(name)`` returns, as multiple of that after ``first``."""
    with ProcessPoolExecutor(1, mp_context=_forked) as pool:
        return pool.submit(_growth, prepare, name, first, last).result()


def _growth(prepare: Callable[[str], Callable[[int], Any]], name: str, first: int, last: int) -> float:
    run = prepare(name)
    for number in range(first):
        run(number)
    before = _resident()
    for number in range(first, last):
        run(number)
    return _resident() / before


def _resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _setting() -> Setting:
    """Plans for a patch; those networks that take their features from there become small."""
    setting = patch_setting((SIDE, SIDE), 1, 3)
    architecture = setting.plans["configurations"][setting.configuration]["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [min(n, 32) for n in architecture["features_per_stage"]]
    return setting


def _small(name: str) -> type[Any]:
    """The trainer with a small network."""
    published = monai_baselines._monai
    monai_baselines._monai = lambda network: (
        lambda *args, **settings: published(network)(*args, **(settings | NARROW[network]))
    )
    base = find_trainer(name)
    assert base is not None
    return type(name, (base,), {"network_kwargs": SMALL.get(base.network_name, base.network_kwargs)})


def training(name: str) -> Callable[[int], Any]:
    """Training steps with four batches in turn."""
    setting = _setting()
    with temporary_folders() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(_small(name), setting, 2, folder, CPU)
    batches = [make_batch(trainer, setting.patch, 2) for _ in range(4)]
    trainer.network.train()
    return lambda number: trainer.train_step(batches[number % 4])


def prediction(name: str) -> Callable[[int], Any]:
    """Predictions of four images in turn, by two folds, whose networks are prepared once and kept."""
    setting = _setting()
    with contextlib.redirect_stdout(io.StringIO()):
        predicting = predictor(_small(name), Job(name, setting, 1, None, "cpu", 1, 0, False), CPU)
        predicting.list_of_parameters = [
            {key: value + fold for key, value in predicting.network.state_dict().items()} for fold in (0, 1e-3)
        ]
    images = [torch.randn(1, 2, SIDE + 16 * n, SIDE + 8 * n) for n in range(4)]
    return lambda number: predicting.predict_logits_from_preprocessed_data(images[number % 4])
