"""Everything of nnU-Net that we touch: its failure names the symbol that a new release has moved or changed.

``.ci/contract`` runs this file against each release that we support.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WHEELS = os.environ.get("LIGHTNETS_NNUNET_WHEELS")  # folder of other releases


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
    "nnunetv2.utilities.plans_handling.plans_handler:PlansManager.get_label_manager": None,
    "nnunetv2.utilities.get_network_from_plans:get_network_from_plans": [
        "arch_class_name",
        "arch_kwargs",
        "arch_kwargs_req_import",
        "input_channels",
        "output_channels",
        "allow_init",
        "deep_supervision",
    ],
    "nnunetv2.utilities.label_handling.label_handling:determine_num_input_channels": [
        "plans_manager",
        "configuration_or_config_manager",
        "dataset_json",
    ],
    "nnunetv2.experiment_planning.experiment_planners.network_topology:get_pool_and_conv_props": [
        "spacing",
        "patch_size",
        "min_feature_map_size",
        "max_numpool",
    ],
    "nnunetv2.experiment_planning.plan_and_preprocess_api:preprocess_dataset": [
        "dataset_id",
        "plans_identifier",
        "configurations",
        "num_processes",
        "verbose",
        "show_progress_bar",
    ],
}
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


def imports() -> list[str]:
    """Each name that our code imports from nnU-Net, wherever in a file it does, as ``module:name``."""
    found = set()
    for folder in ("nnunetv2_lightnets", "plans", "trainers"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nnunetv2":
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize("path", imports())
def test_imports(path: str) -> None:
    try:
        symbol(path)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"nnU-Net no longer has {path}: {error}")


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


@pytest.mark.parametrize("path", SOURCES)
def test_sources_we_rely_on(path: str) -> None:
    source = inspect.getsource(symbol(path))
    at = -1
    for fragment in SOURCES[path]:
        found = source.find(fragment, at + 1)
        assert found >= 0, f"nnU-Net's {path} no longer has {fragment!r}, or not in this order"
        at = found


@pytest.mark.slow
def test_other_releases(tmp_path: Path) -> None:
    """This file, against every wheel of nnU-Net in the folder that LIGHTNETS_NNUNET_WHEELS names."""
    wheels = sorted(Path(WHEELS).glob("nnunetv2-*.whl")) if WHEELS else []
    if not wheels:
        pytest.skip("LIGHTNETS_NNUNET_WHEELS names no folder with wheels of nnU-Net; .ci/contract gets them")
    for wheel in wheels:
        release = tmp_path / wheel.stem
        zipfile.ZipFile(wheel).extractall(release)
        kept = {key: value for key, value in os.environ.items() if key != "LIGHTNETS_NNUNET_WHEELS"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", __file__],
            env=kept | {"PYTHONPATH": str(release), "LIGHTNETS_NNUNET_RELEASE": wheel.name.split("-")[1]},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{wheel.name}\n{done.stdout[-4000:]}"


def test_release_is_the_one_meant() -> None:
    expected = os.environ.get("LIGHTNETS_NNUNET_RELEASE", version("nnunetv2"))
    found = importlib.util.find_spec("nnunetv2")
    assert version("nnunetv2") == expected, f"nnU-Net {version('nnunetv2')} at {found}, expected {expected}"
