"""Parameters and multiply-accumulates of every network at the papers' input sizes, beside the papers' claims.

    python benchmarks/network_costs.py

Nothing is measured: one counter counts all networks on fake tensors, the scan included, as ``nnUNetv2_lightnets
networks`` does. Writes ``benchmarks/results/network_costs.csv`` and ``paper_claims.csv``. Takes some minutes. Every
page that shows a network's parameters or MACs has them from :func:`cells`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from recording import RESULTS, Record, Tables, argument_parser, link, markdown, read_rows, short, table

from nnunetv2_lightnets.costs.command import CLAIMS
from nnunetv2_lightnets.costs.trainers import BASELINE, find_trainer_class, fitting_trainers, trainer_costs
from nnunetv2_lightnets.costs.worker import check_claim
from nnunetv2_lightnets.nnunet.plans import patch_setting

COUNTS, CHECKED = RESULTS / "network_costs.csv", RESULTS / "paper_claims.csv"
INPUTS = (  # patch, channels, classes of the papers' tables
    ((128, 128, 128), 1, 3),  # LightM-UNet, LiTS
    ((96, 96, 96), 3, 1),  # UltraLightUNet 3D
    ((512, 512), 3, 2),  # LightM-UNet, Montgomery & Shenzhen
    ((256, 256), 3, 1),  # U-Lite, MK-UNet
    ((320, 320), 1, 14),  # Swin-UMamba, AMOS
)


def shown_input(patch: Sequence[int], channels: int, classes: int) -> str:
    """``128×128×128, 1→3``."""
    return f"{'×'.join(map(str, patch))}, {channels}→{classes}"


LITS, VOLUME, LUNG, IMAGE, AMOS = (shown_input(*size) for size in INPUTS)
CLAIM_COLUMNS = ("source", "trainer", "input", "quantity", "claim", "counter", "counter gives", "ours", "why")
CLAIMS_SHOWN = (  # those that do not hold, the most different first
    ("nnUNetTrainerLightMUNet", LITS, "parameters"),
    ("nnUNetTrainerLightMUNet", LITS, "MACs"),
    (BASELINE, LITS, "parameters"),
    ("nnUNetTrainerUltraLightUNet", IMAGE, "MACs"),
    ("nnUNetTrainerUltraLightUNetM", VOLUME, "MACs"),
    ("nnUNetTrainerSwinUMamba", AMOS, "MACs"),
    ("nnUNetTrainerSwinUMambaD", AMOS, "MACs"),
)
FAMILIES = (  # one network of each
    BASELINE,
    "nnUNetTrainerLightMUNet",
    "nnUNetTrainerULite",
    "nnUNetTrainerUltraLightUNet",
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerUMambaBot",
    "nnUNetTrainerSegResNet",
)
LIGHT_M = ("nnUNetTrainerLightMUNet", "nnUNetTrainerLightMUNetS", "nnUNetTrainerLightMUNetT")
ULTRA_LIGHT = tuple(f"nnUNetTrainerUltraLightUNet{variant}" for variant in ("T", "S", "", "M", "L"))
PAGES = {  # trainers, inputs whose parameters are shown, inputs whose MACs are
    "docs/benchmark.md": (FAMILIES, (LITS, IMAGE), (LITS, VOLUME, LUNG, IMAGE, AMOS)),
    "docs/lightm_unet.md": (LIGHT_M, (LUNG, LITS), (LUNG, LITS)),
    "docs/swin_umamba.md": (("nnUNetTrainerSwinUMamba", "nnUNetTrainerSwinUMambaD"), (AMOS,), (LUNG, IMAGE, AMOS)),
    "docs/ulite.md": (("nnUNetTrainerULite",), (IMAGE, LITS), (IMAGE, VOLUME, LITS)),
    "docs/ultralight_unet.md": (ULTRA_LIGHT, (IMAGE, VOLUME), (IMAGE, VOLUME)),
}


def count_networks() -> Iterable[dict[str, Any]]:
    """A row for each input size and trainer; nnU-Net's own first."""
    for patch, channels, classes in INPUTS:
        setting = patch_setting(patch, channels, classes)
        for trainer in (BASELINE, *fitting_trainers(len(patch))):
            network, parameters, macs = trainer_costs(find_trainer_class(trainer), setting)
            row = {"input": shown_input(setting.patch, channels, classes), "trainer": trainer, "network": network}
            yield row | {"parameters": parameters, "MACs": macs}


def count_claims() -> Iterable[dict[str, Any]]:
    """A row for each published number."""
    for claim in json.loads(CLAIMS.read_text(encoding="utf-8")):
        counted = check_claim(find_trainer_class(claim["trainer"]), claim)
        size = shown_input(claim["patch"], claim["channels"], claim["classes"])
        values = (claim["source"], claim["trainer"], size, claim["quantity"], claim["as"], claim["counter"])
        more = (counted["counter_gives"], counted["ours"], claim["why"])
        yield dict(zip(CLAIM_COLUMNS, (*values, *more), strict=True))


@cache
def counts() -> dict[tuple[str, str], tuple[int, int]]:
    """Parameters and MACs as recorded, by trainer and input."""
    rows = read_rows(COUNTS)
    return {(row["trainer"], row["input"]): (int(row["parameters"]), int(row["MACs"])) for row in rows}


def cells(trainer: str, parameters_at: Sequence[str], macs_at: Sequence[str]) -> dict[str, str]:
    """Cells of a trainer's row, by their column's title: million parameters and GMAC at some inputs.

    A network that does not exist for an input has an empty cell.
    """
    found = {f"parameters (M), {size}": (trainer, size, 0, 1e6) for size in parameters_at}
    found |= {f"GMAC, {size}": (trainer, size, 1, 1e9) for size in macs_at}
    return {
        title: short(counts()[trainer, size][which] / unit) if (trainer, size) in counts() else ""
        for title, (trainer, size, which, unit) in found.items()
    }


def claims_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Claims in M and G, beside what their counter gives and what is true."""
    columns = ("paper", "network", "input", "claim", "its counter gives", "counted here", "why")
    by_name = {(row["trainer"], row["input"], row["quantity"]): row for row in rows}
    lines = []
    for name in CLAIMS_SHOWN:
        row = by_name[name]
        unit, scale = ("M", 1e6) if row["quantity"] == "parameters" else ("GMAC", 1e9)
        gives = f"{float(row['counter gives']) / scale:.3f} ({row['counter']})"
        ours = f"{float(row['ours']) / scale:.3f} {unit}"
        network = row["trainer"].removeprefix("nnUNetTrainer") or "nnU-Net"
        source = row["source"].partition(",")[0]
        values = (source, network, row["input"], row["claim"], gives, ours, row["why"])
        lines.append(dict(zip(columns, values, strict=True)))
    return markdown(columns, lines)


def tables() -> Tables:
    """Of all pages that show what networks cost."""
    found: Tables = {}
    for page, (trainers, parameters_at, macs_at) in PAGES.items():
        rows = [{"trainer": f"`{trainer}`"} | cells(trainer, parameters_at, macs_at) for trainer in trainers]
        found[page] = [*table(rows), "", link(page, COUNTS, "All trainers, and all digits")]
    page = "docs/benchmark.md"
    title = "What networks have and compute at these inputs (channels→classes):"
    claims = [*claims_table(read_rows(CHECKED)), "", link(page, CHECKED, "All claims, those that hold included")]
    found[page] = [*claims, "", title, "", *found[page]]
    return found


def main() -> None:
    """Count all."""
    argument_parser(__doc__).parse_args()
    Record(CHECKED, "source", "trainer", "input", "quantity").put(*count_claims())
    record = Record(COUNTS, "input", "trainer")
    for row in count_networks():
        record.put(row)


if __name__ == "__main__":
    main()
