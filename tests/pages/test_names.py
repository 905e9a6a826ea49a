"""Labels of results on a page: short, distinct, never empty."""

from __future__ import annotations

import pytest

from nnunetv2_lightnets.pages.names import budget_in_words, page_names, short, shortened

SIX = ["LightMUNetSNoScan", "LightMUNetS", "SlimUNet", "ULite", "UltraLightUNet"]


def test_what_all_names_share_is_left_out_and_said_once():
    names = page_names([f"nnUNetTrainer{name}_4epochs_250iters" for name in ["", *SIX]])
    assert list(names.labels.values()) == ["nnUNetTrainer", *SIX]
    assert names.shared == {"budget": "4 epochs of 250 iterations"}
    assert names.label("nnUNetTrainerULite_4epochs_250iters") == "ULite"
    assert names.label("something else") == "something else"


@pytest.mark.parametrize(
    ("names", "labels", "shared"),
    [
        (["nnUNetTrainer", "nnUNetTrainerULite"], ["nnUNetTrainer", "ULite"], ()),
        (["nnUNetTrainer"], ["nnUNetTrainer"], ()),
        (["nnUNetTrainerULite_5epochs"], ["ULite"], ("5 epochs",)),
        # A part that differs stays, with all names, also where a name lacks it.
        (
            ["nnUNetTrainer", "nnUNetTrainerULite_100epochs", "nnUNetTrainerULite_2epochs"],
            ["nnUNetTrainer", "ULite_100epochs", "ULite_2epochs"],
            (),
        ),
        (["nnUNetTrainer_5epochs", "nnUNetTrainer_50epochs"], ["5epochs", "50epochs"], ("nnUNetTrainer",)),
        (["nnUNetTrainer", "nnUNetTrainer_50epochs"], ["nnUNetTrainer", "nnUNetTrainer_50epochs"], ()),
        (
            ["nnUNetTrainer__nnUNetPlans__2d", "nnUNetTrainer__nnUNetResEncUNetMPlans__2d"],
            ["nnUNetPlans", "ResEncUNetM"],
            ("nnUNetTrainer", "2d"),
        ),
        (
            ["nnUNetTrainerULite__nnUNetPlans__2d", "nnUNetTrainer__nnUNetPlans__3d_fullres"],
            ["ULite 2d", "nnUNetTrainer 3d_fullres"],
            ("nnUNetPlans",),
        ),
        (
            ["nnUNetTrainer", "nnUNetTrainerULite", "nnUNetTrainer__nnUNetResEncUNetMPlans"],
            ["nnUNetTrainer", "ULite", "nnUNetTrainer ResEncUNetM"],
            (),
        ),
        # compare writes plans and configuration only where they tell results apart.
        (
            ["nnUNetTrainerULite", *(f"nnUNetTrainer__nnUNet{plans}Plans__2d" for plans in ("", "ResEncUNetM"))],
            ["ULite", "nnUNetTrainer nnUNetPlans", "nnUNetTrainer ResEncUNetM"],
            (),
        ),
        # Names that the user gave.
        (["a_5epochs", "b_5epochs"], ["a_5epochs", "b_5epochs"], ()),
        (["_a", "nnUNetTrainerULite_5epochs"], ["_a", "ULite_5epochs"], ()),
        (["ULite", "nnUNetTrainerULite"], ["ULite", "nnUNetTrainerULite"], ()),
    ],
)
def test_labels(names, labels, shared):
    found = page_names(names)
    assert list(found.labels) == names
    assert list(found.labels.values()) == labels
    assert tuple(found.shared.values()) == shared


def test_budgets_in_words():
    texts = [budget_in_words(suffix) for suffix in ("_4epochs_250iters", "_250iters", "_4epochs", "")]
    assert texts == ["4 epochs of 250 iterations", "epochs of 250 iterations", "4 epochs", ""]


def test_short_names_stay_distinct():
    assert short("nnUNetTrainerLightMUNetSNoScan", 20) == "nnUNetTra…NetSNoScan"
    long = [f"trained on the first half{n}of all cases, with care" for n in (1, 2)]
    assert len(set(shortened(long))) == 2
    assert shortened(["a", "b"]) == ["a", "b"]
    names = page_names(long)
    assert list(names.labels.values()) == long
    assert list(names.for_charts()) == long
    assert len(set(names.for_charts().values())) == 2
