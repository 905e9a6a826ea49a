"""README's picture shows what its rule says, and no case that somebody picked."""

from __future__ import annotations

import json

import pytest
from pictures import DATA, RECORDED, TRAINERS, Predictions


@pytest.mark.parametrize("dataset", DATA)
def test_the_light_networks_are_the_two_that_compute_least(dataset: str) -> None:
    files = (RECORDED / dataset).glob("*/training.json")
    macs = {file.parent.name.removesuffix(DATA[dataset][0]): json.loads(file.read_text())["macs"] for file in files}
    assert set(TRAINERS) == {"nnUNetTrainer", *sorted(macs, key=macs.__getitem__)[:2]}


def test_the_case_is_the_median_one() -> None:
    data = Predictions("Dataset504_Hippocampus")
    agreement = {case: data.agreement(case) for case in data.maps["nnU-Net"]}
    shown = agreement[data.median_case()]
    better, worse = (sum(map(of, agreement.values())) for of in (lambda a: a > shown, lambda a: a < shown))
    assert abs(better - worse) <= 1 and len(agreement) == 60
