"""Operators of the networks: selective scan, directional scans of images, causal convolution, Mamba layer."""

from nnunetv2_lightnets.ops.causal_conv1d import causal_conv1d
from nnunetv2_lightnets.ops.mamba_layer import Layer, mamba_layer
from nnunetv2_lightnets.ops.scan_order import CROSS_SCAN, scan_order
from nnunetv2_lightnets.ops.selective_scan import available_backends, directional_scan, selective_scan, use_backend

__all__ = [
    "CROSS_SCAN",
    "Layer",
    "available_backends",
    "causal_conv1d",
    "directional_scan",
    "mamba_layer",
    "scan_order",
    "selective_scan",
    "use_backend",
]
