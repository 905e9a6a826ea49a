"""Our plans in nnU-Net's own commands: its stock trainer, ours, and prediction with both."""

from __future__ import annotations

import json

import pytest
from nnunet_server import Commands

from nnunet_commands import DATASET, ID, NNUNet

PLANS = "nnUNetPlans_ultralight_unet_T"
OURS, STOCK = "nnUNetTrainerUltraLightUNetT_1epochs_2iters", "nnUNetTrainer_1epochs_2iters"


@pytest.mark.slow
def test_plan_train_predict(nnunet: NNUNet, forked: Commands) -> None:
    said = nnunet.must("nnUNetv2_lightnets", "plan", "-d", str(ID), "-tr", OURS, "-c", "3d_fullres").stdout
    assert "Do not preprocess again" in said
    written = json.loads((nnunet.preprocessed / DATASET / f"{PLANS}.json").read_text())
    assert written["plans_name"] == PLANS
    for trainer in (STOCK, OURS):
        arguments = (str(ID), "3d_fullres", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu")
        forked.must("nnUNetv2_train", *arguments)
        results = nnunet.results / DATASET / f"{trainer}__{PLANS}__3d_fullres" / "fold_0"
        assert (results / "validation" / "summary.json").exists()
        predicted = nnunet.folder / trainer
        forked.must(
            "nnUNetv2_predict",
            *("-i", str(nnunet.raw / DATASET / "imagesTs"), "-o", str(predicted), "-d", str(ID), "-c", "3d_fullres"),
            *("-f", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu", "-npp", "1", "-nps", "1"),
        )
        assert len(list(predicted.glob("*.nii.gz"))) == 2
    # Weights of one trainer go into the other: the network is the same.
    checkpoint = nnunet.results / DATASET / f"{OURS}__{PLANS}__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    arguments = (str(ID), "3d_fullres", "1", "-tr", STOCK, "-p", PLANS, "-device", "cpu")
    forked.must("nnUNetv2_train", *arguments, "-pretrained_weights", str(checkpoint))


@pytest.mark.slow
def test_preprocess_where_data_are_missing(nnunet: NNUNet) -> None:
    folder = nnunet.preprocessed / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = "Elsewhere"
    plans["configurations"] = {"2d": plans["configurations"]["2d"] | {"data_identifier": "Elsewhere_2d"}}
    (folder / "Elsewhere.json").write_text(json.dumps(plans))
    arguments = ("plan", "-d", str(ID), "-tr", OURS, "-p", "Elsewhere", "--suffix", "elsewhere", "--preprocess")
    nnunet.must("nnUNetv2_lightnets", *arguments, "-np", "1")
    assert len(list((folder / "Elsewhere_2d").glob("*.pkl"))) == 6
    assert "Do not preprocess again" in nnunet.must("nnUNetv2_lightnets", *arguments).stdout
