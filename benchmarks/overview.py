"""README's tables: each main network in one line, from what the other scripts recorded. Nothing is measured.

python benchmarks/overview.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy import HIPPOCAMPUS, NUCLEI, RUNS, Run, compared
from pages import DOCS, markdown, read_rows, write_table

from nnunetv2_lightnets.costs.trainers import BASELINE

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = DOCS.parent / "README.md"
TRAINERS = (
    BASELINE,
    "nnUNetTrainerSlimUNet",
    "nnUNetTrainerLightMUNet",
    "nnUNetTrainerLightMUNetS",
    "nnUNetTrainerLightMUNetT",
    "nnUNetTrainerULite",
    "nnUNetTrainerUltraLightUNet",
    "nnUNetTrainerUltraLightUNetT",
    "nnUNetTrainerSwinUMambaScratch",
    "nnUNetTrainerSwinUMambaDScratch",
)
SLOW = "nnUNetTrainerLightMUNetS"


@dataclass(frozen=True)
class Part:
    """One table: where its columns come from.

    Attributes:
        title: of the first column.
        counted: an input of ``network_costs.csv``.
        timed: a patch of ``trainers_cpu.csv``.
        run: of the accuracies.
        subject: of the run's data set.
    """

    title: str
    counted: str
    timed: str
    run: Run
    subject: str


PARTS = (
    Part("3D", "128×128×128, 1→3", "64×64×64", HIPPOCAMPUS, "Hippocampus"),
    Part("2D", "256×256, 3→1", "256×256", NUCLEI, "nuclei"),
)


def dice(run: Run, folder: Path) -> dict[str, str]:
    """Mean Dice in percent of each trainer that was trained in a run."""
    comparison = compared(run, folder)
    scores = [] if comparison is None else comparison.overall("Dice").scores
    return {score.result.removesuffix(run.budget): f"{100 * score.mean:.1f}" for score in scores}


def table(part: Part, results: Path) -> list[str]:
    """Markdown: a row for each trainer whose network exists in the dimension."""
    costs = {row["trainer"]: row for row in read_rows(results / "network_costs.csv") if row["input"] == part.counted}
    times = {row["trainer"]: row for row in read_rows(results / "trainers_cpu.csv") if row["patch"] == part.timed}
    scores = dice(part.run, results / "accuracy")
    size = part.counted.partition(",")[0]
    rows: list[Mapping[str, Any]] = []
    for trainer in TRAINERS:
        if trainer not in costs:
            continue
        row = {
            part.title: f"`{trainer}`",
            "parameters (M)": f"{int(costs[trainer]['parameters']) / 1e6:.2f}",
            f"GMAC at {size}": f"{int(costs[trainer]['MACs']) / 1e9:.2f}",
        }
        for what, name in (("inference", "prediction"), ("training", "training step")):
            ratio = float(times[trainer][f"{what}_s"]) / float(times[BASELINE][f"{what}_s"])
            row[f"{name}, CPU, {part.timed}"] = f"{ratio:.2f}×"
        row[f"Dice, {part.subject}"] = scores.get(trainer, "")
        rows.append(row)
    return markdown(list(rows[0]), rows)


def recipe_note(results: Path) -> str:
    """What the light network with the slowest recipe reaches with nnU-Net's."""
    reached = []
    for part in PARTS:
        run = next(run for run in RUNS if run.dataset == part.run.dataset and run.recipe is not None)
        reached.append(f"{dice(run, results / 'accuracy')[SLOW]} ({part.subject})")
    return (
        f"`{SLOW}` has its published recipe, made for longer trainings; nnU-Net's takes it to {' and '.join(reached)}."
    )


def write_page(results: Path) -> None:
    """Put the tables on the page."""
    lines: list[str] = []
    for part in PARTS:
        lines += [*table(part, results), ""]
    write_table(PAGE, Path(__file__).name, [*lines, recipe_note(results)])


if __name__ == "__main__":
    write_page(RESULTS)
