"""The command ``nnUNetv2_lightnets plan``."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import read_json, write_atomically
from nnunetv2_lightnets.nnunet.folders import dataset_folder
from nnunetv2_lightnets.nnunet.plans import PLANS, Setting, patch_setting
from nnunetv2_lightnets.nnunet.trainer_names import nearest_trainers, trainer_names
from nnunetv2_lightnets.plans.planner import GIGABYTE, MEMORY, Planned, Planner, plans_name, with_kept_configurations
from nnunetv2_lightnets.plans.reference import ReferenceSetting, reference_names, reference_setting
from nnunetv2_lightnets.trainers import find_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments in nnU-Net's style."""
    parser.description = (
        "Makes plans whose patch size, batch size and strides fit one of our networks, from those that nnU-Net made "
        "for the data set. -p takes them in every nnU-Net command. Preprocessed data stay as they are."
    )
    parser.add_argument("-d", required=True, metavar="ID", help="data set, planned by nnU-Net")
    parser.add_argument("-tr", metavar="TRAINER", help="trainer; --like brings one")
    parser.add_argument("-c", nargs="+", metavar="CONFIGURATION", help="(default: all that the network exists for)")
    parser.add_argument("-p", default=PLANS, metavar="PLANS", help=f"plans to start from (default: {PLANS})")
    parser.add_argument("--memory", type=float, metavar="GB",
                        help=f"memory that a training step may take (default: {MEMORY:g}, as in nnU-Net)")  # fmt: skip
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"),
                        help="where to train: mixed precision on cuda, float32 elsewhere "
                        "(default: cuda where there is one, else cpu)")  # fmt: skip
    parser.add_argument("--suffix", metavar="NAME", help="end of the new plans' name")
    parser.add_argument("--preprocess", action="store_true", help="preprocess what is not yet preprocessed")
    parser.add_argument("-np", type=int, default=4, metavar="N", help="processes of --preprocess (default 4)")
    parser.add_argument("--like", metavar="NAME", help="a paper's settings: " + ", ".join(reference_names()))


def run(args: argparse.Namespace) -> int:
    """Plan, write, and say what comes next."""
    reference = None if args.like is None else reference_setting(args.like)
    trainer_class = _trainer(args.tr or (reference.trainer if reference else None))
    _check(args)
    folder = dataset_folder(args.d)
    remedy = f"plan it with nnUNetv2_plan_experiment -d {args.d}"
    read_json(folder / "dataset_fingerprint.json", f"make it with nnUNetv2_extract_fingerprint -d {args.d}")
    base = read_json(folder / f"{args.p}.json", remedy)
    dataset_json = read_json(folder / "dataset.json", remedy)
    name = plans_name(trainer_class, args.suffix or args.like)
    if name == args.p:
        raise LightNetsError(f"-p {args.p} would be overwritten by the plans made from it; give another --suffix")
    fixed = {} if reference is None else reference.fixed()
    device = args.device or _device_here()
    planner = Planner(trainer_class, base, dataset_json, name, args.memory, **fixed, device=device)
    configurations = args.c or _fitting(trainer_class, base, reference)
    planned = planner.plan(configurations)
    plans = _write(folder / f"{name}.json", planner.plans)
    for line in _report(planned, reference, trainer_class, device):
        print(line)
    missing = _not_preprocessed(folder, plans, planned, int(dataset_json["numTraining"]))
    if missing and args.preprocess:
        _preprocess(folder.name, name, missing, args.np)
    elif missing:
        print(f"Not preprocessed yet: {', '.join(missing)}. Do it with:")
        print(f"  nnUNetv2_preprocess -d {args.d} -plans_name {name} -c {' '.join(missing)}")
    else:
        print(f"The data preprocessed for {args.p} serve these plans. Do not preprocess again: that would delete them.")
    trainer = args.tr or trainer_class.__name__
    if reference is not None and args.tr is None and (epochs := reference.settings["epochs"]["value"]):
        trainer += f"_{epochs}epochs"
    # nnU-Net's plans name 2d first. Volumes are best trained as volumes.
    first = planned[0] if args.c else max(planned, key=lambda p: (len(p.patch), p.configuration == "3d_fullres"))
    print("Train with:")
    print(f"  {shlex.join(['nnUNetv2_train', args.d, first.configuration, '0', '-tr', trainer, '-p', name])}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.memory is not None and not 0 < args.memory < float("inf"):
        raise LightNetsError(f"--memory must be above 0 GB, got {args.memory:g}")
    if args.np < 1:
        raise LightNetsError(f"-np must be at least 1, got {args.np}")
    if args.suffix is not None and not args.suffix.replace("_", "").replace("-", "").isalnum():
        raise LightNetsError(f"--suffix becomes part of a file name: letters, digits, - and _, got {args.suffix!r}")


def _trainer(name: str | None) -> type[Any]:
    if name is None:
        raise LightNetsError("give a trainer with -tr, or a paper's settings with --like")
    found: type[Any] | None = find_trainer(name)
    if found is None:
        likely = ", ".join(nearest_trainers(name) or trainer_names())
        raise LightNetsError(f"there is no trainer {name!r} of ours; did you mean {likely}?")
    if (reason := _why_nothing_fits(found)) is not None:
        raise LightNetsError(f"{name} {reason}: -p {PLANS}")
    return found


def _why_nothing_fits(trainer_class: type[Any]) -> str | None:
    """Why there is nothing to plan for this trainer; None if there is."""
    if getattr(trainer_class, "n_downsamplings", None) is not None:
        return None
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    setting = patch_setting([64, 64], 1, 2)  # every network exists in 2D
    configuration = PlansManager(setting.plans).get_configuration(setting.configuration)
    if not hasattr(trainer_class, "network_name") or "strides" in trainer_class.planned_architecture(configuration):
        return "takes its stages from nnU-Net's own plans, which fit it as they are"
    with torch.device("meta"):
        network = trainer_class.trained_network(configuration, 1, 2)
    if hasattr(network, "stride"):
        return None
    return "pads any patch to its own fixed stages, so that there is nothing to fit; take nnU-Net's own plans"


def _fitting(trainer_class: type[Any], base: dict[str, Any], reference: ReferenceSetting | None) -> list[str]:
    """Configurations of the plans in whose dimension the network exists, and which the reference is for."""
    from nnunetv2_lightnets.networks import network_entry

    dims_of = {name: len(Setting(name, base, {}, name).patch) for name in base["configurations"]}
    exists = network_entry(trainer_class.network_name).spatial_dims
    fitting = [name for name, dims in dims_of.items() if dims in exists]
    if reference is not None:
        fitting = [name for name in fitting if dims_of[name] == reference.dims]
    if not fitting:
        what = f"{reference.dims}D, as in {reference.name}" if reference else " or ".join(f"{d}D" for d in exists)
        raise LightNetsError(
            f"{trainer_class.__name__} needs a configuration in {what}; {base['dataset_name']} has: "
            f"{', '.join(dims_of)}"
        )
    return fitting


def _write(file: Path, plans: dict[str, Any]) -> dict[str, Any]:
    """Write the plans whole or not at all, with what an older file has beside them; returns what was written."""
    if file.exists():
        before = read_json(file, "delete it")
        plans = with_kept_configurations(plans, before)
        print(f"{file} existed: its configurations of the same names are overwritten")
    try:
        write_atomically(file, json.dumps(plans, indent=4) + "\n")
    except OSError as error:
        raise LightNetsError(f"{file} could not be written: {error.strerror or error}; check the folder") from error
    print(f"Written: {file}")
    return plans


def _device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _report(
    planned: Sequence[Planned], reference: ReferenceSetting | None, trainer_class: type[Any], device: str
) -> list[str]:
    precision = "mixed precision on a GPU" if device == "cuda" else "float32"
    lines = [
        f"  {p.configuration}: patch {' x '.join(map(str, p.patch))}, batch size {p.batch_size}, "
        f"about {p.memory / GIGABYTE:.2f} GB for a training step in {precision}"
        for p in planned
    ]
    if reference is not None:
        lines += [f"Settings of {reference.title} ({reference.paper}):", *reference.lines()]
        if trainer_class.__name__ != reference.trainer:
            lines.append(f"  These are settings of {reference.trainer}, not of {trainer_class.__name__}.")
    return lines


def _not_preprocessed(folder: Path, plans: dict[str, Any], planned: Sequence[Planned], cases: int) -> list[str]:
    """Configurations whose preprocessed data are not there, or not of all cases."""
    names: dict[str, str] = {}  # of the first configuration with each data identifier
    for name in (p.configuration for p in planned):
        names.setdefault(Setting(name, plans, {}, name).data_identifier, name)
    return [name for data, name in names.items() if sum(1 for _ in (folder / data).glob("*.pkl")) < cases]


def _preprocess(dataset: str, plans: str, configurations: Sequence[str], processes: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
    from nnunetv2.paths import nnUNet_raw

    if not nnUNet_raw.is_set() or not Path(str(nnUNet_raw), dataset).is_dir():
        raise LightNetsError(f"--preprocess needs the images of {dataset} in nnUNet_raw, which is {nnUNet_raw.get()!r}")
    number = int(dataset.removeprefix("Dataset").partition("_")[0])
    preprocess_dataset(number, plans, list(configurations), [processes] * len(configurations))
