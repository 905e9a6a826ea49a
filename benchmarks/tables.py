"""Every table of the documentation that a script makes, written anew from recorded results. Nothing is measured.

python benchmarks/tables.py
"""

from __future__ import annotations

import importlib

from recording import write_tables

SCRIPTS = (  # each has tables()
    "accuracy",
    "configurations",
    "gpu",
    "light_cnns_cpu",
    "light_cnns_trainings",
    "lightm_unet_counts",
    "network_costs",
    "networks_cpu",
    "overview",
    "page_faults",
    "plans",
    "selective_scan",
    "statistics_checks",
    "swin_umamba_counts",
    "swin_umamba_forward",
    "trainers_cpu",
    "training_memory",
    "under_load",
    "versions",
)


def main() -> None:
    """Write all of them."""
    for script in SCRIPTS:
        write_tables(script, importlib.import_module(script).tables())


if __name__ == "__main__":
    main()
