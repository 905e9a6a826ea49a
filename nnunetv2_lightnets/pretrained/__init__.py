"""Weights made by others: the papers' released checkpoints."""

from nnunetv2_lightnets.pretrained.official import load_official

__all__ = ["load_official"]
