"""The contract with nnU-Net: everything of it that our code uses, in one list.

Read by the contract test, which runs against each release that we support, and by ``doctor``, which says what another
release lacks.
"""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer"
PLANS = "nnunetv2.utilities.plans_handling.plans_handler"

_WITHOUT_PARAMETERS = (
    "initialize configure_optimizers on_train_start on_epoch_start on_train_epoch_start _get_deep_supervision_scales "
    "_build_loss _do_i_compile"
)

# ``module:name.attribute`` and the parameters; None where any will do. ``a|b`` is a parameter whose name has changed.
NAMES: dict[str, str | None] = {
    **{f"{TRAINER}.{name}": "self" for name in _WITHOUT_PARAMETERS.split()},
    f"{TRAINER}.__init__": "self plans configuration fold dataset_json device",
    f"{TRAINER}.build_network_architecture": (
        "plans_manager configuration_manager num_input_channels num_output_channels enable_deep_supervision"
    ),
    f"{TRAINER}.set_deep_supervision_enabled": "self enabled",
    f"{TRAINER}.train_step": "self batch",
    f"{TRAINER}.save_checkpoint": "self filename",
    f"{TRAINER}.load_checkpoint": "self filename_or_checkpoint|checkpoint",
    f"{TRAINER}.perform_actual_validation": "self save_probabilities",
    f"{TRAINER}.print_to_log_file": "self args also_print_to_console add_timestamp",
    "nnunetv2.configuration:default_num_processes": None,
    "nnunetv2.evaluation.evaluate_predictions:compute_metrics": None,
    "nnunetv2.evaluation.evaluate_predictions:label_or_region_to_key": None,
    "nnunetv2.experiment_planning.experiment_planners.network_topology:get_pool_and_conv_props": (
        "spacing patch_size min_feature_map_size max_numpool"
    ),
    "nnunetv2.experiment_planning.plan_and_preprocess_api:preprocess_dataset": (
        "dataset_id plans_identifier configurations num_processes verbose show_progress_bar"
    ),
    "nnunetv2.imageio.reader_writer_registry:determine_reader_writer_from_dataset_json": None,
    "nnunetv2.inference.predict_from_raw_data:nnUNetPredictor": None,
    "nnunetv2.paths:nnUNet_extTrainer": None,
    "nnunetv2.paths:nnUNet_raw": None,
    "nnunetv2.training.lr_scheduler.polylr:PolyLRScheduler.__init__": (
        "self optimizer initial_lr max_steps exponent current_step"
    ),
    "nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA:nnUNetTrainerNoDA": None,
    "nnunetv2.utilities.find_objects:recursive_find_trainer_class_by_name": "trainer_name",
    "nnunetv2.utilities.get_network_from_plans:get_network_from_plans": (
        "arch_class_name arch_kwargs arch_kwargs_req_import input_channels output_channels allow_init deep_supervision"
    ),
    "nnunetv2.utilities.helpers:dummy_context.__init__": None,
    "nnunetv2.utilities.label_handling.label_handling:LabelManager": None,
    "nnunetv2.utilities.label_handling.label_handling:determine_num_input_channels": (
        "plans_manager configuration_or_config_manager dataset_json"
    ),
    f"{PLANS}:ConfigurationManager": None,
    f"{PLANS}:PlansManager.get_configuration": "self configuration_name",
    f"{PLANS}:PlansManager.get_label_manager": None,
}

# Properties of a configuration.
PROPERTIES = (
    "patch_size",
    "batch_size",
    "pool_op_kernel_sizes",
    "data_identifier",
    "network_arch_class_name",
    "network_arch_init_kwargs",
    "network_arch_init_kwargs_req_import",
    "previous_stage_name",
)

# Fragments of source that we repeat, or whose order we rely on: nnU-Net offers no hook there.
SOURCES: dict[str, list[str]] = {
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
    f"{TRAINER}.__init__": ["self.initial_lr = 1e-2", "self.weight_decay = 3e-5"],
    f"{TRAINER}.configure_optimizers": ["torch.optim.SGD(", "momentum=0.99, nesterov=True", "PolyLRScheduler("],
    f"{TRAINER}.on_train_start": ["save_json(self.plans_manager.plans, join(self.output_folder_base, 'plans.json')"],
    f"{TRAINER}.load_checkpoint": ["checkpoint['network_weights']", "self.my_init_kwargs = checkpoint['init_args']"],
    f"{PLANS}:ConfigurationManager.__init__": ["self.configuration = configuration_dict"],
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
    # What the planner's plans rely on: the class by its dotted path, outputs by strides, the last weight 0.
    "nnunetv2.utilities.get_network_from_plans:get_network_from_plans": [
        "pydoc.locate(network_class)",
        "architecture_kwargs['deep_supervision'] = deep_supervision",
        "input_channels=input_channels",
        "num_classes=output_channels",
        "**architecture_kwargs",
    ],
    f"{TRAINER}.set_deep_supervision_enabled": ["mod.decoder.deep_supervision = enabled"],
    f"{TRAINER}._get_deep_supervision_scales": ["np.cumprod(", "pool_op_kernel_sizes", "[:-1]"],
    f"{TRAINER}._build_loss": ["1 / (2 ** i)", "weights[-1] = 0", "weights / weights.sum()", "DeepSupervisionWrapper("],
    "nnunetv2.training.loss.deep_supervision:DeepSupervisionWrapper.forward": ["if weights[i] != 0.0"],
    "nnunetv2.paths:nnUNet_results.get": ["os.environ.get(self.env_var_name)"],
    "nnunetv2.preprocessing.preprocessors.default_preprocessor:DefaultPreprocessor.run": ["data_identifier", "rmtree("],
    "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner:ExperimentPlanner.__init__": [
        "self.UNet_min_batch_size = 2",
        "self.max_dataset_covered = 0.05",
    ],
    # Words of its errors, which we shorten to one line.
    "nnunetv2.utilities.dataset_name_id_conversion:convert_id_to_dataset_name": [
        "Could not find a dataset with the ID"
    ],
    "nnunetv2.utilities.find_objects:recursive_find_trainer_class_by_name": ["Could not find requested nnunet trainer"],
}


symbol = pkgutil.resolve_name  # ``module:attribute.attribute`` as an object


def _found(path: str) -> Any:
    try:
        return symbol(path)
    except (ImportError, AttributeError):
        return None


def name_fault(path: str) -> str | None:
    """What is wrong with a name of NAMES in the nnU-Net that is installed; None if nothing is."""
    found, expected = _found(path), NAMES[path]
    if found is None:
        return f"{path} is missing"
    if expected is None:
        return None
    parameters = list(inspect.signature(inspect.unwrap(found)).parameters)
    wanted = [name.split("|") for name in expected.split()]
    if len(parameters) == len(wanted) and all(p in names for p, names in zip(parameters, wanted, strict=True)):
        return None
    return f"{path} takes {', '.join(parameters)}"


def property_fault(name: str) -> str | None:
    """What is wrong with a property of a configuration; None if nothing is."""
    path = f"{PLANS}:ConfigurationManager.{name}"
    return None if isinstance(_found(path), property) else f"{path} is missing"


def source_fault(path: str) -> str | None:
    """What is missing, or has another place, in the source of a function; None if nothing is."""
    if (found := _found(path)) is None:
        return f"{path} is missing"
    source, at = inspect.getsource(found), -1
    for fragment in SOURCES[path]:
        at = source.find(fragment, at + 1)
        if at < 0:
            return f"{path} no longer has {fragment!r}, or not in this order"
    return None


def faults() -> list[str]:
    """All that the installed nnU-Net lacks or does in another way, one line each."""
    found = [*map(name_fault, NAMES), *map(property_fault, PROPERTIES), *map(source_fault, SOURCES)]
    return list(dict.fromkeys(fault for fault in found if fault is not None))
