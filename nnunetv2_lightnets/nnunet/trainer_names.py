"""The names of our trainers, without importing any: which file each is in, and which a user may have meant."""

from __future__ import annotations

import difflib
import re

# Trainer -> file in this folder.
TRAINERS = {
    "nnUNetTrainerLightMUNet": "lightm_unet",
    "nnUNetTrainerLightMUNetS": "lightm_unet",
    "nnUNetTrainerLightMUNetT": "lightm_unet",
    "nnUNetTrainerLightMUNetDemo": "lightm_unet",
    "nnUNetTrainerLightMUNetNoScan": "lightm_unet",
    "nnUNetTrainerLightMUNetSNoScan": "lightm_unet",
    "nnUNetTrainerLightMUNetTNoScan": "lightm_unet",
    "nnUNetTrainerULite": "ulite",
    "nnUNetTrainerUltraLightUNet": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetT": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetS": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetM": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetL": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetSingleKernel": "ultralight_unet",
    "nnUNetTrainerSwinUMamba": "swin_umamba",
    "nnUNetTrainerSwinUMambaScratch": "swin_umamba",
    "nnUNetTrainerSwinUMambaScratchNoScan": "swin_umamba",
    "nnUNetTrainerSwinUMambaD": "swin_umamba",
    "nnUNetTrainerSwinUMambaDScratch": "swin_umamba",
    "nnUNetTrainerUMambaBot": "umamba",
    "nnUNetTrainerUMambaEnc": "umamba",
    "nnUNetTrainerSegResNet": "monai_baselines",
    "nnUNetTrainerUNETR": "monai_baselines",
    "nnUNetTrainerSwinUNETR": "monai_baselines",
    "nnUNetTrainerSlimUNet": "slim_unet",
    "nnUNetTrainerSlimUNetLightMUNet": "slim_unet",
    "nnUNetTrainerSlimUNetLightMUNetT": "slim_unet",
    "nnUNetTrainerSlimUNetULite": "slim_unet",
    "nnUNetTrainerSlimUNetUltraLightUNet": "slim_unet",
}

BUDGET = re.compile(r"_([1-9]\d*)(epochs|iters)")


def trainer_names() -> list[str]:
    """Names of all trainers for data of one's own, without suffixes."""
    return [name for name in TRAINERS if not name.endswith("Demo")]


def nearest_trainers(name: str) -> list[str]:
    """Up to three trainer names that resemble ``name``, whose suffixes are kept where they are well formed."""
    match = re.match(r"(nnUNetTrainer[A-Za-z0-9]*)(.*)$", name)
    base, suffix = match.groups() if match else (name, "")
    if suffix and not re.fullmatch(rf"(?:{BUDGET.pattern})+", suffix):
        suffix = ""
    # "nnUNetTrainer" itself is common to all names and says nothing about likeness.
    short = {key.removeprefix("nnUNetTrainer").lower(): key for key in TRAINERS}
    found = difflib.get_close_matches(base.removeprefix("nnUNetTrainer").lower(), short, n=3, cutoff=0.5)
    return [short[key] + suffix for key in found]
