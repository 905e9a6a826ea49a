"""The name under which plans files know our networks: ``nnunetv2_lightnets.plans.networks.LightMUNet``."""

from nnunetv2_lightnets.nnunet.planned_networks import __getattr__  # noqa: F401
