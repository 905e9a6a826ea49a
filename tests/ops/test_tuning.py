"""Choices by measurement: which candidate is taken, and what is kept of it in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_lightnets.ops import tuning

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Card:
    """Stands for a GPU on which candidates take the times that are set here; None: they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.times: dict[str, float | None] = {"wide": 3.0, "narrow": 2.0}
        self.calls: list[str] = []
        self.name, self.capturing = "Card A", False
        monkeypatch.setenv("NNUNET_LIGHTNETS_CACHE", str(folder))
        monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE, raising=False)
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "_place", lambda device: self.name)
        monkeypatch.setattr(tuning, "_milliseconds", self.milliseconds)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def milliseconds(self, candidate: str, run: Callable[[str], object]) -> float:
        run(candidate)
        time = self.times[candidate]
        if time is None:
            raise RuntimeError("out of resources\nmore lines")
        return time

    def choose(self, *key: Any, device: torch.device = GPU) -> str:
        return tuning.choose("scan", key or ("fp32",), ["wide", "narrow"], self.calls.append, device)

    def forget(self) -> None:
        """As a new process."""
        tuning._chosen.clear()
        self.calls.clear()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    return Card(monkeypatch, tmp_path / "new" / "folder")


def test_the_fastest_is_taken_and_measured_once(card: Card) -> None:
    assert card.choose() == "narrow"
    assert card.calls.count("wide") == card.calls.count("narrow") == tuning.ROUNDS + 1
    card.calls.clear()
    assert card.choose() == "narrow" and not card.calls
    card.times["narrow"] = 4.0
    assert card.choose("fp16") == "wide"


def test_times_are_on_disk_for_the_next_process_with_this_card(card: Card, tmp_path: Path) -> None:
    card.choose()
    content = json.loads((tmp_path / "new" / "folder" / "tuning.json").read_text())
    assert content == {"Card A": {"scan: fp32": {"chosen": "narrow", "milliseconds": {"wide": 3.0, "narrow": 2.0}}}}
    card.forget()
    assert card.choose() == "narrow" and not card.calls
    card.forget()
    card.name = "Card B"
    assert card.choose() == "narrow" and card.calls
    assert set(json.loads((tmp_path / "new" / "folder" / "tuning.json").read_text())) == {"Card A", "Card B"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"Card A": 3}',
        '{"Card A": {"scan: fp32": "narrow"}}',
        '{"Card A": {"scan: fp32": {"chosen": "gone"}}}',
    ],
)
def test_a_file_that_says_nothing_useful_is_measured_anew(card: Card, tmp_path: Path, content: str) -> None:
    (tmp_path / "new" / "folder").mkdir(parents=True)
    (tmp_path / "new" / "folder" / "tuning.json").write_text(content)
    assert card.choose() == "narrow" and card.calls
    card.forget()
    assert card.choose() == "narrow" and not card.calls


def test_a_folder_that_cannot_be_written_costs_only_the_record(card: Card, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("a file where the folder would be")
    assert card.choose() == "narrow"


def test_a_candidate_that_fails_is_left_out_and_nothing_is_recorded(card: Card, tmp_path: Path) -> None:
    card.times["narrow"] = None
    assert card.choose() == "wide"
    card.calls.clear()
    assert card.choose() == "wide" and not card.calls, "it is remembered, and not tried at every call"
    assert not (tmp_path / "new" / "folder" / "tuning.json").exists()
    card.forget()
    card.times["wide"] = None
    assert card.choose() == "wide", "the first one, whose own error the caller then sees"


def test_an_error_while_timing_stops_nothing(card: Card, tmp_path: Path) -> None:
    calls = 0

    def run(candidate: str) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert tuning.choose("scan", ("fp32",), ["wide", "narrow"], run, GPU) == "wide"
    assert not (tmp_path / "new" / "folder" / "tuning.json").exists()


def test_nothing_is_measured_where_nothing_can_be(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.choose(device=CPU) == "wide"
    card.capturing = True
    assert card.choose() == "wide"
    card.capturing = False
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "off")
    assert card.choose() == "wide"
    assert not card.calls
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE)
    assert card.choose() == "narrow", "none of them was remembered"
