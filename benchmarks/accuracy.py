"""Accuracy at equal small budgets on real data, through nnU-Net's commands; a control beside each idea.

    python benchmarks/accuracy.py --folder WORK --raw RAW [--data 504 505] [--trainer NAME ...] [--recipe]

takes the data sets of RUNS from RAW (in nnU-Net's raw format) and, for each of them and each trainer, runs

    nnUNetv2_plan_and_preprocess, nnUNetv2_train (fold 0, with its validation), nnUNetv2_predict (imagesTs)

in nnU-Net folders under WORK, with a copy of nnU-Net's plans that has the batch (and, in 2D, the patch) of RUNS. A data
set's own ``splits_final.json`` is kept: Hippocampus has two scans of each subject, which must not be torn apart. A
run with a ``recipe`` trains all its networks with that one trainer, nnU-Net's own: the plans name the network then, as
``nnUNetv2_lightnets plan`` writes them. What a training leaves goes to ``benchmarks/results/accuracy/RUN/TRAINER``:

* ``summary.json``: nnU-Net's scores of the validation cases; ``nnUNetv2_lightnets compare`` reads these folders;
* ``predictions.zip``: the label maps of the test images, whose labels this script does not need: score them with
  ``nnUNetv2_evaluate_folder`` where you have them;
* ``training.json``: budget, patch, batch, parameters and multiply-accumulates, and the machine.

What is there is not done again. The tables of ``docs/accuracy.md`` are computed from these files alone.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunet_server import Commands
from recording import RESULTS, Tables, argument_parser, machine
from recording import table as markdown

from nnunetv2_lightnets.comparison.analysis import Comparison, Settings, compare
from nnunetv2_lightnets.comparison.comparable import check_comparable
from nnunetv2_lightnets.comparison.results import read_results
from nnunetv2_lightnets.comparison.statistics import Interval
from nnunetv2_lightnets.costs.trainers import find_trainer_class, trainer_costs
from nnunetv2_lightnets.nnunet.plans import Setting
from nnunetv2_lightnets.plans.planner import Planner

PLANS = "nnUNetPlansSmall"
MARGIN = 0.01  # decided before any training: one Dice point
KEPT = RESULTS / "accuracy"
PAGE = "docs/accuracy.md"
CONTROLLED = (
    "nnUNetTrainer",  # the reference of the comparison
    "nnUNetTrainerSlimUNet",
    "nnUNetTrainerLightMUNetS",
    "nnUNetTrainerLightMUNetSNoScan",
    "nnUNetTrainerUltraLightUNet",
    "nnUNetTrainerULite",
)


@dataclass(frozen=True)
class Run:
    """A data set, and what all its trainings have in common.

    Attributes:
        dataset: folder in nnU-Net's raw format.
        configuration: of nnU-Net's plans.
        patch: in place of the planned one, or None.
        batch: patches of a step.
        budget: suffix of the trainers' names.
        trainers: to train, the reference first.
        scans_of_a_subject: cases 1 to n are one subject, n + 1 to 2 n the next, by the number in their name.
        recipe: nnU-Net's trainer that trains the networks of ``trainers``, in place of these; None for themselves.
    """

    dataset: str
    configuration: str
    patch: tuple[int, ...] | None
    batch: int
    budget: str
    trainers: tuple[str, ...]
    scans_of_a_subject: int = 1
    recipe: str | None = None

    @property
    def number(self) -> str:
        """The data set's number."""
        return self.dataset[len("Dataset") :].partition("_")[0]

    @property
    def name(self) -> str:
        """Folder of what is kept."""
        return self.dataset if self.recipe is None else f"{self.dataset}_{self.recipe}"

    def trains(self, trainer: str) -> str:
        """The trainer that nnU-Net is given for the network of ``trainer``, with its budget."""
        return (self.recipe or trainer) + self.budget

    def plans(self, trainer: str) -> str:
        """The plans that nnU-Net is given for the network of ``trainer``."""
        return PLANS if self.recipe is None else f"{PLANS}_{trainer}"


HIPPOCAMPUS = Run(
    "Dataset504_Hippocampus", "3d_fullres", None, 2, "_4epochs_250iters", CONTROLLED, scans_of_a_subject=2
)
NUCLEI = Run(
    "Dataset505_DSB2018Nuclei",
    "2d",
    (128, 128),
    4,
    "_2epochs_250iters",
    (*CONTROLLED, "nnUNetTrainerSwinUMambaScratch"),
)
TWINS = ("nnUNetTrainerLightMUNetSNoScan", "nnUNetTrainerLightMUNetS")
RUNS = (HIPPOCAMPUS, NUCLEI, *(replace(run, trainers=TWINS, recipe="nnUNetTrainer") for run in (HIPPOCAMPUS, NUCLEI)))


def prepare(commands: Commands, raw: Path, run: Run) -> Path:
    """Plan and preprocess once, write the plans that all trainings share, keep the data set's own split.

    Returns:
        The folder of the preprocessed data.
    """
    folder = commands.preprocessed / run.dataset
    if (folder / f"{PLANS}.json").is_file():
        return folder
    if not (commands.raw / run.dataset).exists():
        (commands.raw / run.dataset).symlink_to(raw / run.dataset)
    commands.must("nnUNetv2_plan_and_preprocess", "-d", run.number, "-c", run.configuration, "-np", "1")
    if (split := raw / run.dataset / "splits_final.json").is_file():
        shutil.copy(split, folder)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    chosen = plans["configurations"][run.configuration]
    chosen["patch_size"], chosen["batch_size"] = list(run.patch or chosen["patch_size"]), run.batch
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))
    return folder


def name_network(folder: Path, run: Run, trainer: str) -> None:
    """Write plans with the network of ``trainer``, and the patch and batch of all, beside the shared ones."""
    name = run.plans(trainer)
    shared = json.loads((folder / f"{PLANS}.json").read_text())
    description = json.loads((folder / "dataset.json").read_text())
    patch = shared["configurations"][run.configuration]["patch_size"]
    fixed = {"patch": {len(patch): patch}, "batch_size": {len(patch): run.batch}}
    planner = Planner(find_trainer_class(trainer), shared, description, name, **fixed)
    planner.plan([run.configuration])
    (folder / f"{name}.json").write_text(json.dumps(planner.plans, indent=1))


def model(run: Run, trainer: str) -> tuple[str, ...]:
    """The words that name a training to nnU-Net's commands."""
    return ("-tr", run.trains(trainer), "-p", run.plans(trainer), "-device", "cpu")


def train(commands: Commands, run: Run, trainer: str) -> Path:
    """Train (or go on) with validation; returns the folder of the fold."""
    folder = commands.results / run.dataset / f"{run.trains(trainer)}__{run.plans(trainer)}__{run.configuration}"
    fold = folder / "fold_0"
    if not (fold / "validation" / "summary.json").is_file():
        words = (run.dataset, run.configuration, "0", *model(run, trainer))
        commands.must("nnUNetv2_train", *words, *(["--c"] if fold.exists() else []))
    return fold


def predict(commands: Commands, run: Run, trainer: str) -> Path:
    """Predict the test images as nnU-Net does by default, mirrored; returns the folder of label maps."""
    out = commands.folder / "predictions" / run.name / trainer
    images = commands.raw / run.dataset / "imagesTs"
    which = ("-d", run.dataset, "-c", run.configuration, "-f", "0", *model(run, trainer))
    commands.must("nnUNetv2_predict", "-i", images, "-o", out, *which, "-npp", "1", "-nps", "1")
    return out


def iterations(budget: str) -> int:
    """Training steps that a trainer's suffix promises."""
    found = re.search(r"_(\d+)epochs_(\d+)iters$", budget)
    assert found is not None
    return int(found[1]) * int(found[2])


def keep(commands: Commands, run: Run, trainer: str, fold: Path, predictions: Path, threads: int) -> None:
    """Write what is kept of a training, last of all what says that it is complete."""
    kept = KEPT / run.name / (trainer + run.budget)
    kept.mkdir(parents=True, exist_ok=True)
    description = json.loads((commands.raw / run.dataset / "dataset.json").read_text())
    (kept.parent / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    with zipfile.ZipFile(kept / "predictions.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(predictions.glob(f"*{description['file_ending']}")):
            archive.write(file, file.name)
    plans = json.loads((commands.preprocessed / run.dataset / f"{PLANS}.json").read_text())
    setting = Setting("", plans, description, run.configuration)
    split = json.loads((commands.preprocessed / run.dataset / "splits_final.json").read_text())
    network, parameters, macs = trainer_costs(find_trainer_class(trainer + run.budget), setting)
    facts = {
        "trainer": run.trains(trainer),
        "network": network,
        "configuration": run.configuration,
        "patch": list(setting.patch),
        "batch": run.batch,
        "parameters": parameters,
        "macs": macs,
        "iterations": iterations(run.budget),
        "cases trained on": len(split[0]["train"]),
    }
    facts |= machine() | {"threads": threads}
    (kept / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    scores = json.loads((fold / "validation" / "summary.json").read_text())
    for case in scores["metric_per_case"]:  # where the files were is nobody's concern
        for key in ("reference_file", "prediction_file"):
            case[key] = Path(case[key]).name
    (kept / "summary.json").write_text(json.dumps(scores, indent=1) + "\n")


def compared(run: Run, folder: Path) -> Comparison | None:
    """The comparison of all that is recorded of a data set with its reference; None without two of them."""
    names = [name + run.budget for name in run.trainers]
    there = [name for name in names if (folder / run.name / name / "summary.json").is_file()]
    if len(there) < 2 or there[0] != names[0]:
        return None
    results = read_results([str(folder / run.name / name) for name in there])
    check_comparable(results, ["Dice"])
    subjects = None
    if run.scans_of_a_subject > 1:
        subjects = {case: f"{(int(case[-3:]) - 1) // run.scans_of_a_subject:03d}" for case in results[0].cases}
    return compare(results, Settings(("Dice",), MARGIN), subjects=subjects)


def shown(value: float, interval: Interval | None, sign: str = "") -> str:
    """A Dice in percent, with its interval."""
    text = f"{100 * value:{sign}.1f}"
    return text if interval is None else f"{text} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def table(run: Run, folder: Path) -> list[str]:
    """Markdown: what was trained and how, a row for each network, and the notes of the comparison."""
    comparison = compared(run, folder)
    if comparison is None:
        return [f"{run.name}: not trained yet."]
    facts = {name: json.loads((folder / run.name / name / "training.json").read_text()) for name in comparison.names}
    overall, structures = comparison.overall("Dice"), comparison.by_structure("Dice")
    rows: list[Mapping[str, Any]] = []
    for i, (score, difference) in enumerate(zip(overall.scores, [None, *overall.differences], strict=True)):
        row = {
            "trainer" if run.recipe is None else "network of": score.result.removesuffix(run.budget),
            "parameters (M)": f"{facts[score.result]['parameters'] / 1e6:.2f}",
            "GMAC": f"{facts[score.result]['macs'] / 1e9:.2f}",
        }
        row |= {f"Dice, {t.title}": f"{100 * t.scores[i].mean:.1f}" for t in structures}
        row["mean Dice"] = shown(score.mean, score.interval)
        if difference is not None:
            row["difference"] = shown(difference.mean, difference.interval, "+")
            row["p (Holm)"] = f"{difference.p_holm:.2g}"
            row["verdict"] = difference.verdict
        rows.append(row)
    one = facts[comparison.names[0]]
    cases = len(comparison.reference.cases)
    units = f"{cases} cases" if comparison.subjects is None else f"{cases} scans of {comparison.subjects} subjects"
    recipe = "" if run.recipe is None else f", all with {run.recipe}"
    title = (
        f"**{run.dataset}, {run.configuration}{recipe}**: {one['iterations']} iterations of {one['batch']} patches of "
        f"{'×'.join(map(str, one['patch']))}, {one['cases trained on']} cases to train on, {units} to validate on."
    )
    return [title, "", *markdown(rows)]


def tables() -> Tables:
    """A table for each run."""
    lines: list[str] = []
    for run in RUNS:
        lines += [*table(run, KEPT), ""]
    return {PAGE: lines[:-1]}


def main() -> None:
    """Train what is not recorded yet."""
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where nnU-Net's folders go")
    parser.add_argument("--raw", type=Path, required=True, help="nnUNet_raw with the data sets of RUNS")
    parser.add_argument("--data", nargs="+", choices=sorted({run.number for run in RUNS}), help="all by default")
    parser.add_argument("--trainer", nargs="+", metavar="NAME", help="without suffix; all by default")
    parser.add_argument("--recipe", action="store_true", help="only the runs with one recipe for all networks")
    parser.add_argument("--threads", type=int, default=1, help="more may hang forked predictions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    commands = Commands(args.folder.resolve(), threads=args.threads)
    for run in RUNS:
        if (args.data and run.number not in args.data) or (args.recipe and run.recipe is None):
            continue
        prepare(commands, args.raw.resolve(), run)
        for trainer in run.trainers:
            if args.trainer and trainer not in args.trainer:
                continue
            if (KEPT / run.name / (trainer + run.budget) / "summary.json").exists():
                continue
            if run.recipe is not None:
                name_network(commands.preprocessed / run.dataset, run, trainer)
            fold = train(commands, run, trainer)
            keep(commands, run, trainer, fold, predict(commands, run, trainer), args.threads)
    commands.close()


if __name__ == "__main__":
    main()
