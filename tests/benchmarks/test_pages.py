"""The documentation's tables are what the scripts make of the recorded results."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import statistics
from pathlib import Path
from types import ModuleType

import overview
import pages
import pytest
import tables


@pytest.mark.parametrize(
    ("script", "results"),
    tables.SCRIPTS.items(),
)
def test_a_page_shows_what_is_recorded(
    script: str, results: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: ModuleType = importlib.import_module(script)
    page = Path(shutil.copy(module.PAGE, tmp_path))
    monkeypatch.setattr(module, "PAGE", page)
    before = page.read_text()
    module.write_page(tables.RESULTS / results)
    assert page.read_text() == before


def test_readmes_numbers_are_those_of_the_recorded_files() -> None:
    lines = overview.table(overview.PARTS[0], tables.RESULTS)
    rows = {line.strip("| ").split(" | ")[0].strip("`"): line.strip("| ").split(" | ") for line in lines}
    with (tables.RESULTS / "trainers_cpu.csv").open(newline="") as stream:
        seconds = {(r["patch"], r["trainer"]): float(r["training_s"]) for r in csv.DictReader(stream)}
    ratio = seconds["64×64×64", "nnUNetTrainerULite"] / seconds["64×64×64", "nnUNetTrainer"]
    kept = tables.RESULTS / "accuracy" / "Dataset504_Hippocampus" / "nnUNetTrainerULite_4epochs_250iters"
    cases = json.loads((kept / "summary.json").read_text())["metric_per_case"]
    dice = [statistics.fmean(label["Dice"] for label in case["metrics"].values()) for case in cases]
    # Two scans of a subject count as one there, so the means differ a little.
    assert float(rows["nnUNetTrainerULite"][5]) == pytest.approx(100 * statistics.fmean(dice), abs=0.5)
    assert rows["nnUNetTrainerULite"][4] == f"{ratio:.2f}×"
    assert rows["nnUNetTrainer"][3:5] == ["1.00×", "1.00×"]


def test_a_single_image_makes_most_of_the_lead_on_nuclei() -> None:
    """As docs/accuracy.md says of U-Lite and UltraLightUNet."""

    def dice(trainer: str) -> list[float]:
        kept = tables.RESULTS / "accuracy" / "Dataset505_DSB2018Nuclei" / f"{trainer}_2epochs_250iters"
        cases = json.loads((kept / "summary.json").read_text())["metric_per_case"]
        return [case["metrics"]["1"]["Dice"] for case in sorted(cases, key=lambda case: case["prediction_file"])]

    for trainer in ("nnUNetTrainerULite", "nnUNetTrainerUltraLightUNet"):
        gains = [new - old for new, old in zip(dice(trainer), dice("nnUNetTrainer"), strict=True)]
        assert max(gains) > sum(gains) / 2 > 0


def test_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- table: benchmarks/{}.py -->\nold\n<!-- end of table -->\n"
    page.write_text("above\n" + marks.format("a") + "between\n" + marks.format("b") + "below\n")
    pages.write_table(page, "a.py", pages.markdown(("x", "y"), [{"x": 1}]))
    new = "<!-- table: benchmarks/a.py -->\n\n| x | y |\n|---|---|\n| 1 |  |\n\n<!-- end of table -->\n"
    assert page.read_text() == "above\n" + new + "between\n" + marks.format("b") + "below\n"


@pytest.mark.parametrize("text", ["no mark", "<!-- table: benchmarks/a.py -->\nno end"])
def test_a_page_without_a_place_is_left_alone(text: str, tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="no place for the table"):
        pages.write_table(page, "a.py", ["| x |"])
    assert page.read_text() == text
