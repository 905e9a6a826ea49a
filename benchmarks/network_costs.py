"""Parameters and multiply-accumulates of every network at the papers' input sizes, beside the papers' claims.

    python benchmarks/network_costs.py

Nothing is measured: one counter counts all networks on fake tensors, the scan included, as ``nnUNetv2_lightnets
networks`` does. Writes ``benchmarks/results/network_costs.csv``, ``paper_claims.csv``, and the tables of
``docs/benchmark.md``. Takes some minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import DOCS, markdown, read_rows, write_table

from nnunetv2_lightnets.costs.command import CLAIMS
from nnunetv2_lightnets.costs.trainers import BASELINE, find_trainer_class, fitting_trainers, trainer_costs
from nnunetv2_lightnets.costs.worker import check_claim
from nnunetv2_lightnets.nnunet.plans import patch_setting

RESULTS = Path(__file__).parent / "results" / "network_costs.csv"
CLAIMS_RESULTS = RESULTS.with_name("paper_claims.csv")
PAGE = DOCS / "benchmark.md"
INPUTS = (  # patch, channels, classes of the papers' tables
    ((128, 128, 128), 1, 3),  # LightM-UNet, LiTS
    ((96, 96, 96), 3, 1),  # UltraLightUNet 3D
    ((512, 512), 3, 2),  # LightM-UNet, Montgomery & Shenzhen
    ((256, 256), 3, 1),  # U-Lite, MK-UNet
    ((320, 320), 1, 14),  # Swin-UMamba, AMOS
)
COLUMNS = ("input", "trainer", "network", "parameters", "MACs")
CLAIM_COLUMNS = ("source", "trainer", "input", "quantity", "claim", "counter", "counter gives", "ours", "why")


def shown_input(patch: Sequence[int], channels: int, classes: int) -> str:
    """``128×128×128, 1→3``."""
    return f"{'×'.join(map(str, patch))}, {channels}→{classes}"


def count_networks() -> Iterable[dict[str, Any]]:
    """A row for each input size and trainer; nnU-Net's own first."""
    for patch, channels, classes in INPUTS:
        setting = patch_setting(patch, channels, classes)
        for trainer in (BASELINE, *fitting_trainers(len(patch))):
            counted = trainer_costs(find_trainer_class(trainer), setting)
            yield dict(zip(COLUMNS, (shown_input(setting.patch, channels, classes), trainer, *counted), strict=True))


def count_claims() -> Iterable[dict[str, Any]]:
    """A row for each published number."""
    for claim in json.loads(CLAIMS.read_text(encoding="utf-8")):
        counted = check_claim(find_trainer_class(claim["trainer"]), claim)
        size = shown_input(claim["patch"], claim["channels"], claim["classes"])
        gives = counted["counter_gives"] or ""
        values = (claim["source"], claim["trainer"], size, claim["quantity"], claim["as"], claim["counter"], gives)
        yield dict(zip(CLAIM_COLUMNS, (*values, counted["ours"], claim["why"]), strict=True))


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write row by row."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            stream.flush()


def claims_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Claims in M and G, beside what their counter gives and what is true."""
    columns = ("paper", "network", "input", "claim", "its counter gives", "counted here", "why")
    lines = []
    for row in rows:
        unit, scale = ("M", 1e6) if row["quantity"] == "parameters" else ("GMAC", 1e9)
        gives = f"{float(row['counter gives']) / scale:.3f} ({row['counter']})" if row["counter gives"] else "not known"
        ours = f"{float(row['ours']) / scale:.3f} {unit}"
        name = row["trainer"].removeprefix("nnUNetTrainer") or "nnU-Net"
        source = row["source"].partition(",")[0]
        values = (source, name, row["input"], row["claim"], gives, ours, row["why"])
        lines.append(dict(zip(columns, values, strict=True)))
    return markdown(columns, lines)


def costs_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A row for each trainer, a column for each input: parameters / GMAC."""
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    by_trainer: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{int(row['parameters']) / 1e6:.2f} / {int(row['MACs']) / 1e9:.2f}"
        by_trainer.setdefault(row["trainer"], {"trainer": row["trainer"]})[row["input"]] = cell
    return markdown(["trainer", *inputs], by_trainer.values())


def write_page(results: Path) -> None:
    """Put what is recorded on the page."""
    claims = claims_table(read_rows(results.with_name(CLAIMS_RESULTS.name)))
    title = "Every trainer's network at these inputs (channels→classes), million parameters / GMAC of one patch:"
    write_table(PAGE, Path(__file__).name, [*claims, "", title, "", *costs_table(read_rows(results))])


def main() -> None:
    """Count all."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_csv(CLAIMS_RESULTS, CLAIM_COLUMNS, count_claims())
    write_csv(RESULTS, COLUMNS, count_networks())
    write_page(RESULTS)


if __name__ == "__main__":
    main()
