"""Section d: does it learn? Trainings through nnU-Net's own trainers, equally many minutes each.

A training has as many short epochs as fit into its minutes at the speed of its first steps, so that its learning rate
decays to the end. Data loading and augmentation are nnU-Net's. ``Dice`` is what nnU-Net calls pseudo Dice: of random
patches of the validation cases, mean of the classes. It needs nnU-Net, and a data set: ``--preprocessed`` (nnU-Net's
folder of that name with one data set) or ``--raw`` (which is planned and preprocessed first).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_sections.bench import Bench, Table, usable
from gpu_sections.networks import COMPILE, without_nnunet
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import read_json
from nnunetv2_lightnets.nnunet.folders import PREPROCESSED, RAW, RESULTS

TABLE = Table(
    "training.csv",
    ("trainer", "epoch"),
    ("minutes", "iterations", "learning rate", "training loss", "validation loss", "Dice"),
)
TRAINERS = ("nnUNetTrainer", "nnUNetTrainerLightMUNetS", "nnUNetTrainerULite", "nnUNetTrainerSlimUNet")
TOY_TRAINERS = ("nnUNetTrainer", "nnUNetTrainerULite")
CONFIGURATION, PLANS = "3d_fullres", "nnUNetPlans"
ALL = "all"  # the row of a whole training
NEEDS = "needs a data set: --preprocessed FOLDER (nnU-Net's, holding one), or --raw FOLDER"
_PROCESSES = "nnUNet_def_n_proc"  # nnU-Net's variable
_WARM_UP = 5  # steps by which the number of epochs is found
_START = 15  # seconds that a trainer and its data loaders take, about


def run(bench: Bench) -> None:
    """Train them all, one after the other."""
    missing = without_nnunet()
    source = bench.arguments.preprocessed or bench.arguments.raw
    if missing or not (source or bench.toy):
        return bench.rows.put((ALL, ALL), note=f"nnU-Net is missing: {missing}" if missing else NEEDS)
    with nnunet_folders(bench) as folder:
        trainers = TOY_TRAINERS if bench.toy else TRAINERS
        for position, trainer in enumerate(trainers):
            seconds = 2 if bench.toy else 60 * bench.arguments.train_minutes
            if not seconds:  # what is left is shared
                seconds = max(0, bench.rows.left / (len(trainers) - position) - _START)
            bench.rows.measure((trainer, ALL), partial(train, bench, trainer, folder, seconds), seconds or 30)


# ---- Data ----


@contextmanager
def nnunet_folders(bench: Bench) -> Iterator[Path]:
    """Set nnU-Net's variables; the folder of the preprocessed data set."""
    with tempfile.TemporaryDirectory(prefix="lightnets_gpu_") as temporary:
        for name in (RAW, PREPROCESSED, RESULTS):
            os.environ[name] = str(Path(temporary, name))
            Path(temporary, name).mkdir()
        os.environ[COMPILE] = "f"  # compilation would take the larger part of these minutes
        if bench.toy:
            os.environ |= {_PROCESSES: "1", "nnUNet_n_proc_DA": "1"}
        if bench.arguments.preprocessed:
            os.environ[PREPROCESSED] = str(bench.arguments.preprocessed)
        else:
            raw = Path(temporary, RAW)
            if bench.arguments.raw:
                os.environ[RAW], raw = str(bench.arguments.raw), bench.arguments.raw
            else:
                write_toy_data(raw)
            preprocess(one_dataset(raw))
        yield one_dataset(Path(os.environ[PREPROCESSED]))


def one_dataset(folder: Path) -> Path:
    """The data set in one of nnU-Net's folders.

    Raises:
        LightNetsError: there is none, or several.
    """
    found = sorted(path for path in folder.glob("Dataset*") if path.is_dir())
    if len(found) != 1:
        raise LightNetsError(f"{folder} must hold one folder Dataset..., and holds {len(found)}")
    return found[0]


def preprocess(dataset: Path) -> None:
    """Plan and preprocess, with nnU-Net's command."""
    command = (
        "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as p; p()"
    )
    number = dataset.name.removeprefix("Dataset").partition("_")[0]
    words = ("-d", number, "-c", CONFIGURATION, "-np", os.environ.get(_PROCESSES, "8"))
    subprocess.run([sys.executable, "-c", command, *words], check=True)


def write_toy_data(raw: Path) -> None:
    """Six volumes of noise with a brighter box, which is to be found."""
    import numpy as np
    import SimpleITK

    folder = raw / "Dataset998_Boxes"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for case in range(6):
        label = np.zeros((16, 18, 16), np.uint8)
        label[4:12, 5 : 10 + case % 3, 4:10] = 1
        image = (label + generator.normal(size=label.shape) / 4).astype(np.float32)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), folder / f"imagesTr/case_{case}_0000.nii.gz")
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(label), folder / f"labelsTr/case_{case}.nii.gz")
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "box": 1}}
    description |= {"numTraining": 6, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))


# ---- Training ----


def train(bench: Bench, name: str, dataset: Path, seconds: float) -> dict[str, Any]:
    """Train for some seconds, data loading included; a row for each epoch, and this one for the whole."""
    from nnunetv2_lightnets.costs.trainers import find_trainer_class

    plans = read_json(dataset / f"{PLANS}.json", "plan it with nnU-Net") | {"continue_training": False}
    description = read_json(dataset / "dataset.json", "it comes with nnU-Net's preprocessed data")
    torch.manual_seed(0)
    trainer = find_trainer_class(name)(plans, CONFIGURATION, 0, description, bench.device)
    trainer.disable_checkpointing = True
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = (2, 1) if bench.toy else (50, 10)
    trainer.initialize()
    trainer.logger.plot_progress_png = lambda folder: None  # a second for each of these short epochs
    trainer.on_train_start()
    try:
        trainer.num_epochs = epochs_in(seconds, trainer)
        # The schedule of the learning rate is made anew, as it goes by the number of epochs.
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        start = time.monotonic()
        while trainer.current_epoch < trainer.num_epochs:
            values = one_epoch(trainer)
            minutes = (time.monotonic() - start) / 60
            values = {"minutes": f"{minutes:.3f}"} | values
            bench.rows.put((name, trainer.current_epoch), **values)
            if 60 * minutes > seconds:
                break
    finally:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            getattr(loader, "_finish", lambda: None)()
        usable()
        shutil.rmtree(trainer.output_folder, ignore_errors=True)
    return values


def epochs_in(seconds: float, trainer: Any) -> int:
    """How many fit, by the time of some steps, which are taken back."""
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trainer.on_train_epoch_start()
    for _ in range(2):  # the first ones compile
        trainer.train_step(next(trainer.dataloader_train))
    start = time.monotonic()
    for _ in range(_WARM_UP):
        trainer.train_step(next(trainer.dataloader_train))
    step = (time.monotonic() - start) / _WARM_UP
    network.load_state_dict(before)
    iterations = trainer.num_iterations_per_epoch + trainer.num_val_iterations_per_epoch / 2
    return max(1, int(seconds / (step * iterations)))


def one_epoch(trainer: Any) -> dict[str, Any]:
    """As ``run_training`` of nnU-Net does; what is logged."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    n_steps, n_validations = trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in range(n_steps)])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        validated = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(n_validations)]
        trainer.on_validation_epoch_end(validated)
    trainer.on_epoch_end()
    logged = {
        "training loss": trainer.logger.get_value("train_losses", step=-1),
        "validation loss": trainer.logger.get_value("val_losses", step=-1),
        "Dice": trainer.logger.get_value("mean_fg_dice", step=-1),
    }
    return {
        "iterations": trainer.current_epoch * n_steps,
        "learning rate": f"{trainer.optimizer.param_groups[0]['lr']:.2e}",
        **{key: f"{float(value):.4f}" for key, value in logged.items()},
    }
