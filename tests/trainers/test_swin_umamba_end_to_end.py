"""Swin-UMamba with nnU-Net's commands on real images: ImageNet weights, training, interruption, prediction.

The command that is killed is the installed script; the others are forked from a process that has imported all.

The networks are the published ones, so that the checkpoint's layout is, too; its values are made up.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from nnunet_server import Commands, Done

from nnunet_commands import NNUNet
from nnunetv2_lightnets.files import CACHE_VARIABLE
from nnunetv2_lightnets.networks import create_network
from nnunetv2_lightnets.pretrained.vmamba import vmamba_tiny_shapes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DATA = Path(os.environ.get("LIGHTNETS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
N_TRAIN, N_TEST = 5, 2  # one to validate with


@dataclass
class Case:
    """One recipe on one data set; the cache of weights is its own."""

    dataset: str
    trainer: str
    network: str
    channels: int
    nnunet: NNUNet
    commands: Commands
    cache: Path
    state: dict[str, torch.Tensor]

    @property
    def fold(self) -> Path:
        return self.nnunet.model(self.trainer, "2d", self.dataset) / "fold_0"

    def arguments(self, *more: str) -> tuple[str, ...]:
        return (self.dataset, "2d", "0", "-tr", self.trainer, "-device", "cpu", *more)

    def run(self, command: str, *arguments: str) -> Done:
        return self.commands.run(command, *arguments, **{CACHE_VARIABLE: str(self.cache)})

    def train(self, *more: str) -> Done:
        return self.run("nnUNetv2_train", *self.arguments(*more))


@pytest.fixture(
    scope="module",
    params=[
        ("Dataset508_DSB2018HistoRGB", "nnUNetTrainerSwinUMambaD_2epochs_1iters", "swin_umamba_d", 3),
        ("Dataset505_DSB2018Nuclei", "nnUNetTrainerSwinUMamba_2epochs_1iters", "swin_umamba", 1),
    ],
    ids=["RGB", "gray"],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    dataset, trainer, network, channels = request.param
    archive = DATA / f"{dataset}.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not at hand (set LIGHTNETS_DATA)")
    commands = Commands(tmp_path_factory.mktemp("nnU-Net"))
    nnunet = NNUNet(commands.folder)
    with tarfile.open(archive) as tar:
        tar.extractall(nnunet.raw, filter="data")
    keep_a_few(nnunet.raw / dataset)
    number = dataset[len("Dataset") :].partition("_")[0]
    commands.must("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-np", "1")
    plans_file = nnunet.preprocessed / dataset / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["2d"].update(batch_size=2, patch_size=[248, 256])
    plans_file.write_text(json.dumps(plans))
    state = {key: 0.02 * torch.randn(shape) for key, shape in vmamba_tiny_shapes().items()}
    yield Case(dataset, trainer, network, channels, nnunet, commands, nnunet.folder / "cache", state)
    commands.close()


def keep_a_few(raw: Path) -> None:
    """The first few training and test cases, which are enough to see that everything runs."""
    for part, kept in (("Tr", N_TRAIN), ("Ts", N_TEST)):
        images = sorted((raw / f"images{part}").iterdir())
        names = sorted({image.name.rpartition("_")[0] for image in images})[kept:]
        for image in images:
            if image.name.rpartition("_")[0] in names:
                image.unlink()
        for label in (raw / f"labels{part}").glob("*"):
            if label.name.partition(".")[0] in names:
                label.unlink()
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": N_TRAIN}))


def test_without_weights_training_stops_with_the_remedy(case: Case) -> None:
    done = case.train()
    assert done.code == 2, done.stderr[-2000:]
    assert "there are no ImageNet weights at" in done.stderr
    assert "nnUNetv2_lightnets weights" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(case.fold.glob("checkpoint*")) == []


def test_training_from_imagenet_killed_and_resumed_and_predicted_without_the_file(case: Case, tmp_path: Path) -> None:
    torch.save({"model": case.state}, tmp_path / "vmamba.pth")
    case.nnunet.must(
        "nnUNetv2_lightnets", "weights", "--from", str(tmp_path / "vmamba.pth"), **{CACHE_VARIABLE: str(case.cache)}
    )
    done = case.train()
    assert done.code == 0, done.stderr[-3000:]
    network = create_network(case.network, spatial_dims=2, input_channels=case.channels, num_classes=2)
    keys = network.vmamba_keys()
    log = "".join(file.read_text() for file in case.fold.glob("training_log_*.txt"))
    assert f"ImageNet weights of VMamba: {len(keys)} tensors, " in log

    # Both epochs are of the frozen ones: what was loaded is as it was, the rest has moved.
    final = torch.load(case.fold / "checkpoint_final.pth", weights_only=False)
    weights = final["network_weights"]
    frozen = set(network.frozen_parameters())
    for key, name in keys.items():
        if name in frozen:
            assert torch.equal(weights[name], case.state[key]), name
    assert final["optimizer_state"]["param_groups"][0]["lr"] < 1e-4

    # The same training, killed in its second epoch, goes on where the ImageNet weights are lost.
    shutil.rmtree(case.fold)
    environment = {CACHE_VARIABLE: str(case.cache)}
    with case.nnunet.start("nnUNetv2_train", *case.arguments(), **environment) as process:
        for line in process.stdout:
            if "Epoch 1" in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert not (case.fold / "checkpoint_final.pth").exists()
    shutil.rmtree(case.cache)
    done = case.train("--c")
    assert done.code == 0, done.stderr[-3000:]
    assert "Epoch 1" in done.stdout
    assert "Epoch 0" not in done.stdout
    assert "ImageNet" not in done.stdout
    resumed = torch.load(case.fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(resumed[name], weights[name]) for name in frozen)

    shutil.rmtree(case.fold / "validation")
    done = case.train("--val")
    assert done.code == 0, done.stderr[-3000:]
    assert (case.fold / "validation" / "summary.json").is_file()

    out = tmp_path / "predictions"
    images = str(case.nnunet.raw / case.dataset / "imagesTs")
    predict = ("-i", images, "-o", str(out), "-d", case.dataset, "-c", "2d", "-f", "0", "-tr", case.trainer)
    done = case.run("nnUNetv2_predict", *predict, "-device", "cpu", "-npp", "1", "-nps", "1")
    assert done.code == 0, done.stderr[-3000:]
    assert len([file for file in out.iterdir() if file.suffix in (".png", ".tif")]) == N_TEST
    assert not case.cache.exists()
