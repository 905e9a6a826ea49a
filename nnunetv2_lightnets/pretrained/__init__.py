"""Weights made by others: ImageNet weights of VMamba, and the papers' released checkpoints."""

from nnunetv2_lightnets.pretrained.cache import vmamba_path
from nnunetv2_lightnets.pretrained.official import load_official
from nnunetv2_lightnets.pretrained.vmamba import LoadReport, load_vmamba

__all__ = ["LoadReport", "load_official", "load_vmamba", "vmamba_path"]
