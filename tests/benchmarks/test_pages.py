"""The documentation's tables are what the scripts make of the recorded results, short, and of one mind."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import accuracy
import light_cnns_cpu
import network_costs
import overview
import page_faults
import pytest
import recording
import tables
import trainers_cpu
import versions

PAGES = [recording.ROOT / "README.md", *sorted((recording.ROOT / "docs").glob("*.md"))]
LONG = {  # tables of more than MOST_ROWS rows, by page and first column's title: why they are not cut
    ("api.md", "name"): "an index of names",
    ("api.md", "variable"): "an index, too",
    ("baselines.md", "trainer"): "what each trainer is for; no figures that a file could hold",
    ("planning.md", "name"): "the names that --like takes",
    ("troubleshooting.md", "symptom"): "a reader looks for the one at hand",
    ("troubleshooting.md", "message"): "the same",
    ("weights.md", "message"): "the same",
}
FIGURES = re.compile(r"parameters|GMAC|CPU time|memory|Dice", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table as it stands on a page; cells without code marks."""

    page: str
    generated: bool
    columns: list[str]
    rows: list[list[str]]


def tables_of(page: Path) -> Iterator[Table]:
    generated, code, lines = False, False, list[list[str]]()
    for line in [*page.read_text().splitlines(), ""]:
        code ^= line.startswith("```")
        if line.startswith("|") and not code:
            lines.append([cell.strip(" `") for cell in line.strip().strip("|").split("|")])
        elif lines:
            yield Table(page.name, generated, lines[0], lines[2:])
            lines = []
        if line.startswith("<!-- table:") or line == recording.END:
            generated = line != recording.END


ALL = [table for page in PAGES for table in tables_of(page)]


@pytest.mark.parametrize("script", tables.SCRIPTS)
def test_a_page_shows_what_is_recorded(script: str) -> None:
    found = importlib.import_module(script).tables()
    for page, lines in found.items():
        _, between, _ = recording.placed((recording.ROOT / page).read_text(), script)
        assert between.strip().splitlines() == lines, page
    marked = {page for page in PAGES if f"<!-- table: benchmarks/{script}.py -->" in page.read_text()}
    assert marked == {recording.ROOT / page for page in found}


def test_every_place_for_a_table_has_its_script() -> None:
    named = {name for page in PAGES for name in re.findall(r"<!-- table: benchmarks/(\w+)\.py -->", page.read_text())}
    assert named == set(tables.SCRIPTS)


def test_tables_in_a_text_are_short() -> None:
    long = {(table.page, table.columns[0]) for table in ALL if len(table.rows) > recording.MOST_ROWS}
    assert long <= set(LONG)


def test_a_figure_is_the_same_wherever_it_stands() -> None:
    """The same trainer, quantity and input."""
    places: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for table in ALL:
        for row in table.rows:
            for column, value in zip(table.columns[1:], row[1:], strict=True):
                if row[0].startswith("nnUNetTrainer") and re.search(r"\d×\d", column):
                    places[row[0], column].append((table.page, value))
    several = {key: found for key, found in places.items() if len({page for page, _ in found}) > 1}
    assert len(several) > 50
    assert not {key: found for key, found in several.items() if len({value for _, value in found}) > 1}


def test_no_figures_are_written_by_hand() -> None:
    by_hand = [table for table in ALL if not table.generated and any(map(FIGURES.search, table.columns))]
    assert not by_hand


def test_counts_that_two_files_hold_are_equal() -> None:
    both = 0
    for claim in recording.read_rows(network_costs.CHECKED):
        if counted := network_costs.counts().get((claim["trainer"], claim["input"])):
            assert counted[claim["quantity"] == "MACs"] == int(claim["ours"])
            both += 1
    assert both > 10
    for row in recording.read_rows(recording.RESULTS / "swin_umamba_counts.csv"):
        trainer = {"Swin-UMamba": "nnUNetTrainerSwinUMamba", "Swin-UMamba†": "nnUNetTrainerSwinUMambaD"}
        if row["data set"] == "AbdomenMRI" and row["network"] in trainer:
            counted = network_costs.counts()[trainer[row["network"]], network_costs.AMOS]
            assert counted[0] == int(row["parameters"])


def test_readmes_numbers_are_those_of_the_recorded_files() -> None:
    volumes, images = (table for table in ALL if table.page == "README.md" and table.generated)
    rows = {row[0]: dict(zip(volumes.columns, row, strict=True)) for row in volumes.rows}
    seconds = {
        (row["patch"], row["trainer"]): float(row["training_s"]) for row in recording.read_rows(trainers_cpu.MEASURED)
    }
    ratio = seconds["64×64×64", "nnUNetTrainerULite"] / seconds["64×64×64", "nnUNetTrainer"]
    assert rows["nnUNetTrainerULite"]["CPU time of a training step, 64×64×64"] == f"{ratio:.2f}×"
    assert list(rows["nnUNetTrainer"].values())[3:5] == ["1.00×", "1.00×"]
    memory = {
        (row["patch"], row["trainer"]): int(row["training_MB"]) for row in recording.read_rows(trainers_cpu.MEASURED)
    }
    shown = rows["nnUNetTrainerLightMUNet"]["memory of a training step (MB), 64×64×64"]
    assert shown == f"{memory['64×64×64', 'nnUNetTrainerLightMUNet']:,}"
    assert rows["nnUNetTrainerLightMUNet"]["GMAC, 128×128×128, 1→3"] == "175"
    assert [row[0] for row in images.rows] == [f"nnUNetTrainer{name}" for name in overview.PARTS[1][3]]


def test_dice_on_the_page_is_that_of_the_recorded_file() -> None:
    table = next(table for table in ALL if table.page == "accuracy.md" and "Dice, Anterior" in table.columns)
    row = next(row for row in table.rows if row[0] == "nnUNetTrainerULite")
    kept = accuracy.KEPT / "Dataset504_Hippocampus" / "nnUNetTrainerULite_4epochs_250iters"
    cases = json.loads((kept / "summary.json").read_text())["metric_per_case"]
    dice = [statistics.fmean(label["Dice"] for label in case["metrics"].values()) for case in cases]
    shown = row[table.columns.index("mean Dice")].partition(" ")[0]
    # Two scans of a subject count as one there, so the means differ a little.
    assert float(shown) == pytest.approx(100 * statistics.fmean(dice), abs=0.5)


def test_a_single_image_makes_most_of_the_lead_on_nuclei() -> None:
    """As docs/accuracy.md says of U-Lite and UltraLightUNet."""

    def dice(trainer: str) -> list[float]:
        kept = accuracy.KEPT / "Dataset505_DSB2018Nuclei" / f"{trainer}_2epochs_250iters"
        cases = json.loads((kept / "summary.json").read_text())["metric_per_case"]
        return [case["metrics"]["1"]["Dice"] for case in sorted(cases, key=lambda case: case["prediction_file"])]

    for trainer in ("nnUNetTrainerULite", "nnUNetTrainerUltraLightUNet"):
        gains = [new - old for new, old in zip(dice(trainer), dice("nnUNetTrainer"), strict=True)]
        assert max(gains) > sum(gains) / 2 > 0


def test_words_beside_the_tables_agree_with_them() -> None:
    """What README and docs/lightm_unet.md, memory.md and ultralight_unet.md say of times and memory."""
    versions_rows = {row["network"]: row for row in recording.read_rows(versions.MEASURED)}

    def times_nnunet(network: str, what: str) -> float:
        row = versions_rows[network]
        return float(row[f"after {what}"]) / (float(row["PlainConvUNet MB"]) if what == "MB" else 1)

    assert times_nnunet("lightm_unet S", "forward") == pytest.approx(0.4, abs=0.05)
    assert times_nnunet("lightm_unet S", "training step") == pytest.approx(0.5, abs=0.05)
    assert times_nnunet("lightm_unet S", "MB") == pytest.approx(0.4, abs=0.05)
    assert times_nnunet("lightm_unet", "forward") == pytest.approx(0.7, abs=0.05)
    assert times_nnunet("lightm_unet", "training step") == pytest.approx(1, abs=0.05)
    assert times_nnunet("lightm_unet", "MB") == pytest.approx(0.7, abs=0.05)

    times = {}
    for patch in trainers_cpu.PATCHES:
        (cell,) = trainers_cpu.cells("nnUNetTrainerLightMUNet", patch, ["training_s"]).values()
        times[patch] = float(cell.rstrip("×"))
    volumes, images = ([round(times[patch], 1) for patch in times if patch.count("×") == dims - 1] for dims in (3, 2))
    said = f"{min(volumes)} to {max(volumes)} times its time in 3D and {min(images)} to {max(images)} times in 2D"
    assert said in " ".join((recording.ROOT / "README.md").read_text(encoding="utf-8").split())

    held = {
        row["memory"]: int(row["peak MB"])
        for row in recording.read_rows(page_faults.FAULTS)
        if (row["trainer"], row["step"]) == ("nnUNetTrainerULite", page_faults.FORWARD)
    }
    said = (
        f"{held[page_faults.KEPT] / 1000:.1f} GB with small pages and {held[page_faults.BOTH] / 1000:.1f} GB with huge"
    )
    assert said in " ".join((recording.ROOT / "docs" / "memory.md").read_text(encoding="utf-8").split())

    prepared = [row for row in recording.read_rows(light_cnns_cpu.MEASURED) if row["goals"]]
    missed = {
        (row["network"], len(row["patch"].split("x"))) for row in prepared if float(row["times as published"]) < 2
    }
    assert missed == {("UltraLightUNet T", 4)}
