"""Everything of nnU-Net that we touch: its failure names the symbol that a new release has moved or changed."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest


def symbol(path: str) -> Any:
    """``module:attribute.attribute`` as an object."""
    module, _, attributes = path.partition(":")
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer"
SIGNATURES = {
    f"{TRAINER}.__init__": ["self", "plans", "configuration", "fold", "dataset_json", "device"],
    f"{TRAINER}.build_network_architecture": [
        "plans_manager",
        "configuration_manager",
        "num_input_channels",
        "num_output_channels",
        "enable_deep_supervision",
    ],
    f"{TRAINER}.initialize": ["self"],
    f"{TRAINER}.configure_optimizers": ["self"],
    f"{TRAINER}.set_deep_supervision_enabled": ["self", "enabled"],
    f"{TRAINER}.on_train_start": ["self"],
    f"{TRAINER}.on_epoch_start": ["self"],
    f"{TRAINER}.on_train_epoch_start": ["self"],
    f"{TRAINER}.train_step": ["self", "batch"],
    f"{TRAINER}.save_checkpoint": ["self", "filename"],
    f"{TRAINER}.load_checkpoint": ["self", "filename_or_checkpoint"],
    f"{TRAINER}.perform_actual_validation": ["self", "save_probabilities"],
    f"{TRAINER}._get_deep_supervision_scales": ["self"],
    f"{TRAINER}._build_loss": ["self"],
    f"{TRAINER}._do_i_compile": ["self"],
    f"{TRAINER}.print_to_log_file": ["self", "args", "also_print_to_console", "add_timestamp"],
    "nnunetv2.training.lr_scheduler.polylr:PolyLRScheduler.__init__": [
        "self",
        "optimizer",
        "initial_lr",
        "max_steps",
        "exponent",
        "current_step",
    ],
    "nnunetv2.utilities.find_objects:recursive_find_trainer_class_by_name": ["trainer_name"],
    "nnunetv2.utilities.helpers:dummy_context.__init__": None,
    "nnunetv2.paths:nnUNet_extTrainer": None,
    "nnunetv2.utilities.plans_handling.plans_handler:PlansManager.get_configuration": ["self", "configuration_name"],
}
PROPERTIES = ("patch_size", "batch_size", "pool_op_kernel_sizes")


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path: str) -> None:
    try:
        found = symbol(path)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"nnU-Net no longer has {path}: {error}")
    expected = SIGNATURES[path]
    if expected is not None:
        actual = list(inspect.signature(inspect.unwrap(found)).parameters)
        assert actual == expected, f"nnU-Net changed the signature of {path}"


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_of_a_configuration(name: str) -> None:
    manager = symbol("nnunetv2.utilities.plans_handling.plans_handler:ConfigurationManager")
    assert isinstance(inspect.getattr_static(manager, name), property), f"ConfigurationManager.{name} has changed"


# Fragments of source that we repeat, or whose order we rely on: nnU-Net offers no hook there.
SOURCES = {
    f"{TRAINER}.train_step": [
        "zero_grad(set_to_none=True)",
        "self.loss(output, target)",
        "scale(l).backward()",
        "unscale_(self.optimizer)",
        "clip_grad_norm_(self.network.parameters(), 12)",
        "self.grad_scaler.step(self.optimizer)",
        "self.grad_scaler.update()",
        "self.optimizer.step()",
    ],
    f"{TRAINER}.initialize": [
        "self.build_network_architecture(",
        "torch.compile(self.network)",
        "self.configure_optimizers()",
        "DDP(self.network",
        "self._build_loss()",
    ],
    f"{TRAINER}.save_checkpoint": [
        "'network_weights'",
        "'optimizer_state'",
        "'grad_scaler_state'",
        "'logging'",
        "'_best_ema'",
        "'current_epoch': self.current_epoch + 1",
        "'init_args'",
        "'trainer_name': self.__class__.__name__",
        "'inference_allowed_mirroring_axes'",
    ],
    f"{TRAINER}.run_training": ["self.on_train_start()", "self.on_epoch_start()", "self.on_train_epoch_start()"],
    "nnunetv2.inference.predict_from_raw_data:nnUNetPredictor.initialize_from_trained_model_folder": [
        "recursive_find_trainer_class_by_name(trainer_name)",
        "trainer_class.build_network_architecture(",
        "enable_deep_supervision=False",
        "network.load_state_dict(parameters[0])",
    ],
    "nnunetv2.run.run_training:get_trainer_from_args": ["recursive_find_trainer_class_by_name(trainer_name)"],
    "nnunetv2.run.load_pretrained_weights:load_pretrained_weights": ["'.seg_layers.'"],
}


@pytest.mark.parametrize("path", SOURCES)
def test_sources_we_rely_on(path: str) -> None:
    source = inspect.getsource(symbol(path))
    at = -1
    for fragment in SOURCES[path]:
        found = source.find(fragment, at + 1)
        assert found >= 0, f"nnU-Net's {path} no longer has {fragment!r}, or not in this order"
        at = found
