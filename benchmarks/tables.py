"""Every table of the documentation that a script makes, written anew from recorded results. Nothing is measured.

python benchmarks/tables.py
"""

from __future__ import annotations

import importlib
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
SCRIPTS = {  # each has write_page(results)
    "accuracy": "accuracy",
    "configurations": "configurations.csv",
    "light_cnns_cpu": "light_cnns_cpu.csv",
    "light_cnns_trainings": "light_cnns_trainings.csv",
    "network_costs": "network_costs.csv",
    "networks_cpu": "networks_cpu.csv",
    "overview": ".",
    "plans": "plans.csv",
    "selective_scan": "selective_scan.csv",
    "statistics_checks": "statistics_checks.csv",
    "swin_umamba_forward": "swin_umamba_forward_cpu.csv",
    "trainers_cpu": "trainers_cpu.csv",
    "training_memory": "training_memory.csv",
}


def main() -> None:
    """Write all of them."""
    for script, results in SCRIPTS.items():
        importlib.import_module(script).write_page(RESULTS / results)


if __name__ == "__main__":
    main()
