"""Where plans name our networks: ``nnunetv2_lightnets.plans.networks.LightMUNet``, for plans files and checkpoints."""

from nnunetv2_lightnets.nnunet.planned_networks import __getattr__  # noqa: F401
