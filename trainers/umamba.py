"""U-Mamba's recipe (Ma et al., arXiv:2401.04722, and its published code): nnU-Net's own, deep supervision included.

Features, kernels and strides are those that nnU-Net planned for its own network. The published code needs a second
trainer without mixed precision, as the scan overflowed; here the scan is in float32 always.
"""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer


class nnUNetTrainerUMambaBot(LightNetsTrainer):
    """U-Mamba_Bot: 42.1 M parameters for 3D patches of 128 voxels a side."""

    network_name = "umamba_bot"
    deep_supervision = True

    @classmethod
    def planned_architecture(cls, configuration_manager: ConfigurationManager) -> dict[str, Any]:
        """Features, kernels and strides of nnU-Net's own network, and the patch size.

        Raises:
            LightNetsError: the plans are for another kind of network.
        """
        planned = configuration_manager.network_arch_init_kwargs
        missing = [key for key in ("features_per_stage", "kernel_sizes", "strides") if key not in planned]
        if missing:
            raise LightNetsError(
                f"{cls.__name__} builds its network from {', '.join(missing)}, which the plans' network "
                f"{configuration_manager.network_arch_class_name} does not state; take nnU-Net's own plans, "
                f"-p nnUNetPlans"
            )
        return {
            "features": planned["features_per_stage"],
            "kernel_sizes": planned["kernel_sizes"],
            "strides": planned["strides"],
            "patch_size": configuration_manager.patch_size,
        }


class nnUNetTrainerUMambaEnc(nnUNetTrainerUMambaBot):
    """U-Mamba_Enc: 42.8 M parameters for 3D patches of 128 voxels a side."""

    network_name = "umamba_enc"
