"""The names of our trainers, without importing any: which file each is in, and which a user may have meant."""

from __future__ import annotations

import difflib
import re

# File of trainers/ -> its trainers, all of which begin with nnUNetTrainer; first the one of the network as published.
_FILES = {
    "lightm_unet": "LightMUNet LightMUNetS LightMUNetT LightMUNetDemo "
    "LightMUNetNoScan LightMUNetSNoScan LightMUNetTNoScan",
    "ulite": "ULite",
    "ultralight_unet": "UltraLightUNet UltraLightUNetT UltraLightUNetS UltraLightUNetM UltraLightUNetL "
    "UltraLightUNetSingleKernel",
    "swin_umamba": "SwinUMamba SwinUMambaScratch SwinUMambaScratchNoScan SwinUMambaD SwinUMambaDScratch",
    "umamba": "UMambaBot UMambaEnc",
    "monai_baselines": "SegResNet UNETR SwinUNETR",
    "slim_unet": "SlimUNet SlimUNetLightMUNet SlimUNetLightMUNetT SlimUNetULite SlimUNetUltraLightUNet",
}
# Trainer -> file.
TRAINERS = {f"nnUNetTrainer{name}": file for file, names in _FILES.items() for name in names.split()}

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
