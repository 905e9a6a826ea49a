"""README's tables, to choose a network: what the main ones cost, from what other scripts recorded.

Accuracy is not among the columns: the networks' recipes differ, and so do the budgets at which they get somewhere.
``docs/accuracy.md`` tells that, with intervals. Nothing is measured; ``tables.py`` writes the page.
"""

from __future__ import annotations

import network_costs
import trainers_cpu
from recording import Tables, table

PAGE = "README.md"
COLUMNS = ("inference_s", "training_s", "training_MB")
PARTS = (  # first column's title, input that is counted, patch that is timed, trainers
    (
        "3D",
        network_costs.LITS,
        trainers_cpu.VOLUME,
        ("", "SlimUNet", "LightMUNet", "LightMUNetS", "LightMUNetT", "ULite", "UltraLightUNet"),
    ),
    (
        "2D",
        network_costs.IMAGE,
        trainers_cpu.IMAGE,
        ("", "LightMUNet", "LightMUNetS", "ULite", "UltraLightUNet", "SwinUMamba", "SwinUMambaD"),
    ),
)


def tables() -> Tables:
    """A table for 3D and one for 2D."""
    lines: list[str] = []
    for title, counted, timed, names in PARTS:
        trainers = [f"nnUNetTrainer{name}" for name in names]
        rows = [
            {title: f"`{trainer}`"}
            | network_costs.cells(trainer, [counted], [counted])
            | trainers_cpu.cells(trainer, timed, COLUMNS)
            for trainer in trainers
        ]
        lines += [*table(rows), ""]
    machine = trainers_cpu.machine_of(trainers_cpu.VOLUME)
    return {PAGE: [*lines, f"(1→3: one input channel, three classes.) CPU: {machine}."]}
