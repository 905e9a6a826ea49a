"""Every nnU-Net configuration with every trainer: trained, interrupted, resumed, validated and predicted.

    python benchmarks/configurations.py --folder WORK --volumes DATASET [--rgb DATASET] [--trainer NAME ...]

``--volumes`` is a folder in nnU-Net's raw format with one channel and the labels 1 and 2 (made with Hippocampus of the
Medical Segmentation Decathlon), ``--rgb`` one with RGB images. A row of ``benchmarks/results/configurations.csv`` is
written after each cell; what has run, or was refused, is not done again. A cell is one of

* run: all commands ended well, and left what they should;
* refused: nnU-Net's command ended with code 2 and one line, before anything was written;
* failed: anything else.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk
from configuration_data import DATA_SETS, DataSet, prepare, remove_results
from nnunet_server import Commands, Done
from recording import RESULTS, Record, Tables, argument_parser, link, read_rows
from recording import table as markdown

from nnunetv2_lightnets.files import last_line

TRAINERS = (
    "nnUNetTrainerLightMUNetT",
    "nnUNetTrainerULite",
    "nnUNetTrainerUltraLightUNetT",
    "nnUNetTrainerSwinUMambaScratch",
    "nnUNetTrainerSwinUMambaDScratch",
)
BUDGET = "_2epochs_2iters"
OUTCOMES = RESULTS / "configurations.csv"
PAGE = "docs/configurations.md"
COLUMNS = ("trainer", "cell", "outcome", "reason")


class CellFailed(Exception):
    """A command or what it left is not as it should be."""


class Refused(Exception):
    """nnU-Net's command ended with code 2 and one line, and wrote nothing."""


@dataclass(frozen=True)
class Model:
    """One trainer on one configuration of one data set and fold, with nnU-Net's commands."""

    commands: Commands
    trainer: str
    data: DataSet
    configuration: str
    fold: str = "0"
    warm: bool | None = None

    @property
    def folder(self) -> Path:
        """Results of this model."""
        return self.commands.results / self.data.folder / f"{self.trainer}__nnUNetPlans__{self.configuration}"

    @property
    def checkpoint(self) -> Path:
        """What a finished training leaves."""
        return self.folder / f"fold_{self.fold}" / "checkpoint_final.pth"

    @property
    def predictions(self) -> Path:
        """Where :meth:`predict` writes."""
        return self.commands.results / "predictions" / f"{self.folder.name}__{self.data.number}__{self.fold}"

    def train(self, *more: str | Path, interrupt_at: Path | None = None) -> Done:
        """``nnUNetv2_train`` on the CPU."""
        where = (str(self.data.number), self.configuration, self.fold, "-tr", self.trainer, "-device", "cpu")
        return self.commands.run("nnUNetv2_train", *where, *more, warm=self.warm, interrupt_at=interrupt_at)

    def train_interrupted_and_resumed(self) -> None:
        """Stop with Ctrl-C after the first of two epochs, go on with ``--c`` to the validation."""
        latest = self.checkpoint.with_name("checkpoint_latest.pth")
        first = self.train("--npz", interrupt_at=latest)
        if first.code == 2 and not self.folder.exists():
            lines = [line for line in first.stderr.splitlines() if line.startswith("Error: ")]
            # Any other mistake in one line, such as a missing data set, is this script's own.
            if len(lines) == 1 and f"{self.trainer} cannot train" in lines[0] and "Traceback" not in first.stderr:
                raise Refused(lines[0].removeprefix("Error: "))
        if not (latest.is_file() or self.checkpoint.is_file()):
            raise CellFailed(f"training: {said_last(first)}")
        second = check(self.train("--c", "--npz"), "resumed training")
        if first.code != 0 and ("Epoch 1" not in second.stdout or "Epoch 0" in second.stdout):
            raise CellFailed("the resumed training did not go on with its second epoch")
        for file in (self.checkpoint, self.checkpoint.parent / "validation" / "summary.json"):
            if not file.is_file():
                raise CellFailed(f"{file.name} is missing")

    def predict(self, *more: str | Path, out: Path | None = None) -> None:
        """Predict the test case with probabilities, and check size and labels of what comes out."""
        out = out or self.predictions
        images = self.commands.raw / self.data.folder / "imagesTs"
        model = ("-d", str(self.data.number), "-c", self.configuration, "-f", self.fold, "-tr", self.trainer)
        workers = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta", "--save_probabilities")
        words = ("-i", images, "-o", out, *model, *workers, *more)
        check(self.commands.run("nnUNetv2_predict", *words, warm=self.warm), "prediction")
        check_segmentations(self.commands, self.data, out)


def check(done: Done, what: str) -> Done:
    """``done``, if it ended well.

    Raises:
        CellFailed: if not.
    """
    if done.code != 0:
        raise CellFailed(f"{what} (exit code {done.code}): {said_last(done)}")
    return done


def said_last(done: Done) -> str:
    """What a command said last, on stderr if there is something."""
    return last_line(done.stderr.strip() or done.stdout)[:200]


def check_segmentations(commands: Commands, data: DataSet, folder: Path) -> None:
    """Each test case has a segmentation of its size with the data set's labels."""
    ending = json.loads((commands.raw / data.folder / "dataset.json").read_text())["file_ending"]
    for label in (commands.raw / data.folder / "labelsTs").glob(f"*{ending}"):
        if not (folder / label.name).is_file():
            raise CellFailed(f"no segmentation {label.name}")
        truth, found = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in (label, folder / label.name))
        if truth.shape != found.shape:
            raise CellFailed(f"a segmentation has size {found.shape} instead of {truth.shape}")
        if not set(found.ravel().tolist()) <= data.outputs:
            raise CellFailed("a segmentation holds labels that the data set does not have")


Cell = Callable[[Commands, str], None]


def whole(kind: str, configuration: str, fold: str = "0", warm: bool | None = None) -> Cell:
    """Train, interrupt, resume, validate, predict."""

    def cell(commands: Commands, trainer: str) -> None:
        model = Model(commands, trainer, DATA_SETS[kind], configuration, fold, warm)
        model.train_interrupted_and_resumed()
        model.predict()

    return cell


def trained(commands: Commands, trainer: str, kind: str, configuration: str, fold: str = "0") -> Model:
    """A finished model, trained now if no other cell has."""
    model = Model(commands, trainer, DATA_SETS[kind], configuration, fold)
    if not model.checkpoint.is_file():
        model.train_interrupted_and_resumed()
    if not model.predictions.is_dir():
        model.predict()
    return model


def cascade(commands: Commands, trainer: str) -> None:
    """3d_lowres on all cases, whose segmentations the second stage starts from; then the second stage."""
    data = DATA_SETS["Plain"]
    first = trained(commands, trainer, "Plain", "3d_lowres", "all")
    second = Model(commands, trainer, data, "3d_cascade_fullres")
    second.train_interrupted_and_resumed()
    second.predict("-prev_stage_predictions", first.predictions)


def pretrained(configuration: str) -> Cell:
    """Start a training with three classes from a model with two."""

    def cell(commands: Commands, trainer: str) -> None:
        source = trained(commands, trainer, "Ignore", configuration)
        short = re.sub(r"_.*", "_1epochs_1iters", trainer)
        model = Model(commands, short, DATA_SETS["Plain"], configuration)
        done = check(model.train("-pretrained_weights", source.checkpoint), "training from other weights")
        if "Loading pretrained weights" not in done.stdout:
            raise CellFailed("nnU-Net does not say that weights were loaded")

    return cell


def best_configuration(commands: Commands, trainer: str) -> None:
    """``nnUNetv2_find_best_configuration``, ``nnUNetv2_ensemble``, ``nnUNetv2_apply_postprocessing``."""
    data = DATA_SETS["Plain"]
    models = [trained(commands, trainer, "Plain", "2d")]
    with contextlib.suppress(Refused):  # a trainer for 2D: its cross-validation alone, and an ensemble of one
        models.append(trained(commands, trainer, "Plain", "3d_fullres"))
    names = [model.configuration for model in models]
    find = (str(data.number), "-c", *names, "-tr", trainer, "-f", "0", "-np", "1")
    check(commands.run("nnUNetv2_find_best_configuration", *find), "find_best_configuration")
    merged, final = (commands.results / "predictions" / f"{trainer}_{what}" for what in ("ensemble", "final"))
    folders = [model.predictions for model in models]
    check(commands.run("nnUNetv2_ensemble", "-i", *folders, "-o", merged, "-np", "1"), "ensemble")
    check_segmentations(commands, data, merged)
    information = json.loads((commands.results / data.folder / "inference_information.json").read_text())
    best = information["best_model_or_ensemble"]
    words = ("-i", merged, "-o", final, "-pp_pkl_file", best["postprocessing_file"], "-np", "1")
    words += ("-plans_json", best["some_plans_file"], "-dataset_json", merged / "dataset.json")
    check(commands.run("nnUNetv2_apply_postprocessing", *words), "apply_postprocessing")
    check_segmentations(commands, data, final)


def archive(commands: Commands, trainer: str) -> None:
    """Export to a zip, import where no other model is, and predict the same there."""
    model = trained(commands, trainer, "Plain", "2d")
    file = commands.folder / f"{trainer}.zip"
    which = ("-d", str(model.data.number), "-c", "2d", "-f", "0", "-tr", trainer)
    check(commands.run("nnUNetv2_export_model_to_zip", *which, "-o", file), "export")
    results = commands.folder / "imported" / trainer
    results.mkdir(parents=True, exist_ok=True)
    check(commands.run("nnUNetv2_install_pretrained_model_from_zip", file, nnUNet_results=str(results)), "import")
    file.unlink()
    images, workers = commands.raw / model.data.folder / "imagesTs", ("-device", "cpu", "-npp", "1", "-nps", "1")
    for place in (commands.results, results):  # both now: another number of threads may round differently
        words = ("-i", images, "-o", results / place.name, *which, *workers, "--disable_tta")
        check(commands.run("nnUNetv2_predict", *words, nnUNet_results=str(place)), "prediction")
    for here in (results / commands.results.name).glob("*.nii.gz"):
        if here.read_bytes() != (results / results.name / here.name).read_bytes():
            raise CellFailed("the imported model predicts something else")


CELLS: dict[str, Cell] = {
    "2d, nnU-Net's installed commands": whole("Plain", "2d", warm=False),
    "3d_fullres": whole("Plain", "3d_fullres"),
    "3d_lowres": whole("Plain", "3d_lowres"),
    "3d_lowres, fold all -> 3d_cascade_fullres": cascade,
    "2d, regions": whole("Regions", "2d"),
    "3d_fullres, regions": whole("Regions", "3d_fullres"),
    "2d, ignore label": whole("Ignore", "2d"),
    "3d_fullres, ignore label": whole("Ignore", "3d_fullres"),
    "2d, regions and ignore label": whole("RegionsIgnore", "2d"),
    "3d_fullres, regions and ignore label": whole("RegionsIgnore", "3d_fullres"),
    "2d, three channels": whole("Channels", "2d"),
    "3d_fullres, three channels": whole("Channels", "3d_fullres"),
    "2d, RGB images": whole("RGB", "2d"),
    "2d, batch size 1": whole("Small", "2d_batch_1"),
    "3d, batch size 1": whole("Small", "3d_batch_1"),
    "2d, bottleneck of one pixel, batch size 1": whole("Small", "2d_one_voxel"),
    "3d, bottleneck of one voxel, batch size 1": whole("Small", "3d_one_voxel"),
    "2d, fold all": whole("Small", "2d", "all"),
    "3d_fullres, patch 20x256x224": whole("Thick", "3d_fullres"),
    "3d_fullres, patch 3x512x512": whole("ThreeSlices", "3d_fullres"),
    "2d, -pretrained_weights of another class count": pretrained("2d"),
    "3d_fullres, -pretrained_weights of another class count": pretrained("3d_fullres"),
    "best configuration, ensemble, postprocessing": best_configuration,
    "export and import of the zip": archive,
}


def run_cell(name: str, commands: Commands, trainer: str) -> dict[str, str]:
    """One row of the table."""
    outcome, reason = "run", ""
    try:
        CELLS[name](commands, trainer)
    except Refused as error:
        outcome, reason = "refused", str(error)
    except (CellFailed, OSError) as error:
        outcome, reason = "failed", str(error)
    return dict(zip(COLUMNS, (re.sub(r"_.*", "", trainer), name, outcome, reason), strict=True))


def grouped(trainers: Sequence[str], outcomes: Mapping[tuple[str, str], str]) -> list[dict[str, str]]:
    """A row for all configurations with the same outcomes, a column for each trainer; what nobody tried is left out."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for cell in CELLS:
        found = tuple(outcomes.get((trainer, cell), "not tried") for trainer in trainers)
        if set(found) != {"not tried"}:
            groups.setdefault(found, []).append(cell)
    return [
        {"configurations": "; ".join(cells)}
        | {f"`{trainer}`": one for trainer, one in zip(trainers, found, strict=True)}
        for found, cells in groups.items()
    ]


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Markdown: all configurations with the trainers of the families, and some with others, which come below."""
    outcomes = {(row["trainer"], row["cell"]): row["outcome"] for row in rows}
    lines = markdown(grouped(TRAINERS, outcomes))
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for trainer in dict.fromkeys(row["trainer"] for row in rows if row["trainer"] not in TRAINERS):
        found = tuple((cell, outcomes[trainer, cell]) for cell in CELLS if (trainer, cell) in outcomes)
        groups.setdefault(found, []).append(f"`{trainer}`")
    more = [{"trainers": ", ".join(trainers)} | dict(found) for found, trainers in groups.items()]
    if more:
        lines += ["", *markdown(more)]
    if reasons := [row["reason"] for row in rows if row["outcome"] == "refused"]:
        lines += ["", "A refusal:", "", "```", reasons[0], "```"]
    return lines


def tables() -> Tables:
    """What ran."""
    return {PAGE: [*table(read_rows(OUTCOMES)), "", link(PAGE, OUTCOMES, "Every cell, with every reason")]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not in the table yet."""
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for nnU-Net's folders; can be deleted afterwards")
    parser.add_argument("--volumes", type=Path, required=True, help="raw data set: one channel, labels 1 and 2")
    parser.add_argument("--rgb", type=Path, help="raw data set with RGB images (PNG)")
    parser.add_argument("--trainer", nargs="+", default=TRAINERS, help="without suffix")
    parser.add_argument("--cell", nargs="+", choices=tuple(CELLS), default=tuple(CELLS), metavar="CELL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUTCOMES)
    args = parser.parse_args(arguments)
    record = Record(args.out, "trainer", "cell")
    commands = Commands(args.folder.resolve(), threads=args.threads)
    kinds = [kind for kind in DATA_SETS if kind != "RGB" or args.rgb]
    if not (commands.folder / "prepared").exists():
        prepare(commands, kinds, args.volumes, args.rgb)
        (commands.folder / "prepared").touch()
    for trainer in args.trainer:
        remove_results(commands, trainer)
        for cell in args.cell:
            if cell == "2d, RGB images" and args.rgb is None:
                continue
            ended = {(row["trainer"], row["cell"]) for row in record.rows if row["outcome"] != "failed"}
            if (trainer, cell) not in ended:
                record.put(run_cell(cell, commands, trainer + BUDGET))
        remove_results(commands, trainer)
    commands.close()


if __name__ == "__main__":
    main()
