"""``nnUNetv2_lightnets demo``: nnU-Net's real commands on real MRI, from an empty folder to a picture.

The image is the MNI152 T1 template, an average of 152 heads, with its grey- and white-matter maps; nilearn ships
it, so nothing is downloaded. The template is exactly left-right symmetric: blocks are cut from one hemisphere
only, or a held-out block would have its mirror image among the training blocks. A whole coronal slab is held out.
The labels are nearly a function of intensity: good for a demo, not for claims about a network.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line, read_json, write_atomically
from nnunetv2_lightnets.nnunet.folders import FOLDERS, PREPROCESSED, RAW, RESULTS

DATASET_ID = 990
DATASET = f"Dataset{DATASET_ID}_MNI152Demo"
CONFIGURATION = "3d_fullres"
TRAINER = "nnUNetTrainerLightMUNetDemo_6epochs_30iters"
LABELS = {"background": 0, "grey matter": 1, "white matter": 2}
# One hemisphere of the template at 1 mm, cut into blocks: start and number of blocks along each axis.
BLOCK = (32, 40, 48)
FIRST = (98, 36, 4)
BLOCKS = (2, 4, 3)
HELD_OUT_SLAB = 2  # of the four along the second axis (back to front)


# Into a file or a pipe, too, a step is announced when it begins.
say = functools.partial(print, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments in nnU-Net's style."""
    parser.add_argument(
        "-o", type=Path, default=Path("nnUNet_demo"), metavar="FOLDER", help="where to work (default: ./nnUNet_demo)"
    )
    parser.add_argument("-tr", default=TRAINER, metavar="TRAINER", help=f"trainer (default: {TRAINER})")
    parser.add_argument(
        "-device", default=None, choices=("cpu", "cuda", "mps"), help="default: cuda where there is one"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; started again in the same folder it goes on where it stopped."""
    Demo(args.o.resolve(), args.tr, args.device).run()
    return 0


class Demo:
    """One run of the demo in ``folder``.

    nnU-Net's three path variables are set to folders in it, for the demo's own commands only; whatever they point
    to outside stays untouched. All other nnUNet variables of the user are kept.
    """

    def __init__(self, folder: Path, trainer: str, device: str | None) -> None:
        self.folder, self.trainer = folder, trainer
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LightNetsError(f"-o {folder}: {error.strerror}; choose a folder that can be written") from error
        strangers = [p.name for p in folder.iterdir() if p.name not in (*FOLDERS, "logs", "predictions", "demo.png")]
        if strangers:
            raise LightNetsError(f"-o {folder} holds other files ({strangers[0]}, ...); choose an empty folder")
        self.paths = {name: folder / name for name in FOLDERS}
        for path in (*self.paths.values(), folder / "logs"):
            path.mkdir(exist_ok=True)
        self.environment = {**os.environ, **{name: str(path) for name, path in self.paths.items()}}
        if device is None:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = device
        if device == "cpu":  # the default of 8 export and 12 augmentation processes chokes a laptop
            cores = os.cpu_count() or 1
            self.environment.setdefault("nnUNet_def_n_proc", str(min(cores, 8)))
            self.environment.setdefault("nnUNet_n_proc_DA", str(min(max(cores // 2, 1), 12)))
        self.raw = self.paths[RAW] / DATASET
        self.model = self.paths[RESULTS] / DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}"
        self.seconds: dict[str, float] = {}  # of each step

    def run(self) -> None:
        """All steps in order; a step whose result exists is not repeated."""
        say(f"This demo works in {self.folder}, on {self.device}, with {self.trainer}.")
        if self.trainer == TRAINER:
            say(
                "That is LightM-UNet at width 8 (0.38 M parameters), the width that fits a few minutes on two CPU\n"
                "cores, with a high learning rate and without data augmentation: for this demo, not for your data."
            )
        say()
        for name in FOLDERS:
            say(f"$ export {name}={shlex.quote(str(self.paths[name]))}")

        if not (self.raw / "dataset.json").exists():
            started = time.perf_counter()
            say("\nCutting blocks from the MNI152 template (nilearn)")
            n_train, n_test = make_dataset(self.raw)
            self.seconds["data set"] = time.perf_counter() - started
            say(f"  {n_train} blocks to train on, {n_test} held out: a coronal slab of the same hemisphere")

        preprocessed = self.paths[PREPROCESSED] / DATASET
        self.command(
            "plan and preprocess",
            ["nnUNetv2_plan_and_preprocess", "-d", str(DATASET_ID), "-c", CONFIGURATION, "-np", "2"],
            done=preprocessed / "gt_segmentations" / ".demo_done",
        )
        resume = ["--c"] if any(self.model.glob("fold_0/checkpoint_*.pth")) else []
        train = ["nnUNetv2_train", str(DATASET_ID), CONFIGURATION, "0", "-tr", self.trainer, "-device", self.device]
        self.command("train", train + resume, done=self.model / "fold_0" / "validation" / "summary.json")
        predictions = self.folder / "predictions" / self.trainer
        images = str(self.raw / "imagesTs")
        predict = ["nnUNetv2_predict", "-i", images, "-o", str(predictions), "-d", str(DATASET_ID), "-c", CONFIGURATION]
        predict += ["-f", "0", "-tr", self.trainer, "-device", self.device, "-npp", "1", "-nps", "1"]
        self.command("predict", predict, done=predictions / ".demo_done")
        evaluate = ["nnUNetv2_evaluate_folder", str(self.raw / "labelsTs"), str(predictions)]
        evaluate += ["-djfile", str(predictions / "dataset.json"), "-pfile", str(predictions / "plans.json")]
        self.command("evaluate", evaluate, done=predictions / "summary.json")
        self.report(predictions)

    def command(self, step: str, command: list[str], *, done: Path) -> None:
        """Run one of nnU-Net's commands, shown as a user would type it, unless its result ``done`` exists.

        Its output goes to ``logs/<step>.log``; a training's lines of progress are shown too.
        """
        say(f"\n$ {shlex.join(command)}")
        if done.exists():
            say("  done before")
            return
        executable = shutil.which(command[0], path=os.path.dirname(sys.executable)) or shutil.which(command[0])
        if executable is None:
            raise LightNetsError(f"{command[0]} was not found beside {sys.executable}; is nnunetv2 installed there?")
        log = self.folder / "logs" / f"{step.replace(' ', '_')}.log"
        started = time.perf_counter()
        with (
            log.open("w") as file,
            subprocess.Popen(
                [executable, *command[1:]],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # its workers are ended with it
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    file.write(line)
                    if any(word in line for word in (": Epoch ", "Pseudo dice", "Mean Validation")):
                        say("  " + line.split(": ", 1)[-1].rstrip())
            except BaseException:
                _end(process)
                raise
        if process.returncode != 0:
            last = last_line(log.read_text(errors="replace"))
            raise LightNetsError(f"{command[0]} ended with exit code {process.returncode}: {last} (all of it: {log})")
        if done.name == ".demo_done":  # nnU-Net writes many files here and none of them last
            done.touch()
        self.seconds[step] = time.perf_counter() - started
        say(f"  {self.seconds[step]:.0f} s")

    def report(self, predictions: Path) -> None:
        """Dice per class, times, a picture, and the next command."""
        summary = read_json(predictions / "summary.json", "delete it and run the demo again")
        dice = {name: summary["mean"][str(value)]["Dice"] for name, value in LABELS.items() if value}
        say("\nDice on the held-out blocks (nnU-Net's own evaluation)")
        for name, value in dice.items():
            say(f"  {name:<14}{value:.3f}")
        if self.seconds:
            say("Seconds")
            for step, seconds in {**self.seconds, "all": sum(self.seconds.values())}.items():
                say(f"  {step:<22}{seconds:6.0f}")
        picture = self.folder / "demo.png"
        draw(self.raw, predictions, dice, picture)
        say(f"Picture: {picture}")
        base = self.trainer.split("_")[0]
        for suffix in ("Demo", "T", "S"):
            base = base.removesuffix(suffix)
        say(
            "\nNext, your own data: put it into nnU-Net's format under your nnUNet_raw, then\n"
            "  nnUNetv2_plan_and_preprocess -d YOUR_ID\n"
            f"  nnUNetv2_train YOUR_ID 3d_fullres 0 -tr {base}"
        )


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and all its workers; it gets a few seconds to do so by itself."""
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        return
    for blow in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, blow)
            process.wait(5)


def make_dataset(folder: Path) -> tuple[int, int]:
    """Write the demo's data set in nnU-Net's raw format; returns the numbers of training and held-out blocks.

    The template is standardised as a whole, to mean 0 and standard deviation 1 in the brain, and nnU-Net leaves the
    blocks as they are (``noNorm``): standardised one by one, blocks of little grey matter would turn it white.
    Labels: voxels whose grey- (1) or white-matter (2) probability is the larger one and at least 0.5.

    Raises:
        LightNetsError: if nilearn is missing.
    """
    try:
        import nibabel
        from nilearn import datasets
    except ImportError as error:
        raise LightNetsError(f"the demo's images come from nilearn ({error}): pip install 'nilearn>=0.10'") from error
    import numpy as np

    template = datasets.load_mni152_template(resolution=1)
    image = template.get_fdata(dtype=np.float32)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    brain = image[image > 0]
    image = (image - brain.mean()) / brain.std()
    label = np.zeros(image.shape, np.uint8)
    label[(grey >= 0.5) & (grey >= white)] = LABELS["grey matter"]
    label[(white >= 0.5) & (white > grey)] = LABELS["white matter"]

    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    counts = {"Tr": 0, "Ts": 0}
    for index in np.ndindex(*BLOCKS):
        start = [first + i * size for first, i, size in zip(FIRST, index, BLOCK, strict=True)]
        block = tuple(slice(s, s + size) for s, size in zip(start, BLOCK, strict=True))
        part = "Ts" if index[1] == HELD_OUT_SLAB else "Tr"
        affine = template.affine.copy()
        affine[:3, 3] = (template.affine @ [*start, 1])[:3]
        case = f"block_{''.join(map(str, index))}"
        nibabel.save(nibabel.Nifti1Image(image[block], affine), folder / f"images{part}" / f"{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label[block], affine), folder / f"labels{part}" / f"{case}.nii.gz")
        counts[part] += 1
    description: Mapping[str, Any] = {
        "channel_names": {"0": "noNorm"},
        "labels": LABELS,
        "numTraining": counts["Tr"],
        "file_ending": ".nii.gz",
        "description": "Blocks of the MNI152 (2009) T1 template, one hemisphere; labels from its tissue maps",
    }
    # Written last: its presence says that the data set is complete.
    write_atomically(folder / "dataset.json", json.dumps(description, indent=2))
    return counts["Tr"], counts["Ts"]


def draw(raw: Path, predictions: Path, dice: Mapping[str, float], file: Path) -> None:
    """Image, truth and prediction side by side, of the three held-out blocks with most foreground."""
    import matplotlib

    matplotlib.use("Agg")
    import nibabel
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ["#000000", "#56b4e9", "#e69f00"]  # told apart by colour-blind readers too
    labels = sorted((raw / "labelsTs").glob("*.nii.gz"))
    fullest = sorted(labels, key=lambda path: np.count_nonzero(nibabel.load(path).get_fdata()))[-3:]
    cases = sorted(path.name.removesuffix(".nii.gz") for path in fullest)
    figure, axes = plt.subplots(len(cases), 3, figsize=(8.5, 2.9 * len(cases) + 0.8), layout="constrained")
    as_label: dict[str, Any] = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": 2}
    for row, case in zip(axes, cases, strict=True):
        panels = {
            "T1 image": (raw / "imagesTs" / f"{case}_0000.nii.gz", {"cmap": "gray"}),
            "truth": (raw / "labelsTs" / f"{case}.nii.gz", as_label),
            "prediction": (predictions / f"{case}.nii.gz", as_label),
        }
        for axis, (title, (volume, style)) in zip(row, panels.items(), strict=True):
            voxels = nibabel.load(volume).get_fdata()
            axis.imshow(np.rot90(voxels[:, :, voxels.shape[2] // 2]), interpolation="nearest", **style)
            axis.set(title=title, xticks=[], yticks=[])
        row[0].set_ylabel(case.replace("_", " "))
    handles = [Patch(color=colours[value], label=name) for name, value in LABELS.items() if value]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    figure.suptitle(f"Held-out blocks of the MNI152 template, Dice: {scores}")
    figure.savefig(file, dpi=130)
    plt.close(figure)
