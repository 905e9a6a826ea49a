"""Accuracy at equal small budgets on real data, through nnU-Net's commands; a control beside each idea.

    python benchmarks/accuracy.py --folder WORK --raw RAW [--data 504 505] [--trainer NAME ...]

takes the data sets of RUNS from RAW (in nnU-Net's raw format) and, for each of them and each trainer, runs

    nnUNetv2_plan_and_preprocess, nnUNetv2_train (fold 0, with its validation), nnUNetv2_predict (imagesTs)

in nnU-Net folders under WORK, with a copy of nnU-Net's plans that has the batch (and, in 2D, the patch) of RUNS. A data
set's own ``splits_final.json`` is kept: Hippocampus has two scans of each subject, which must not be torn apart. What a
training leaves goes to ``benchmarks/results/accuracy/DATASET/TRAINER``:

* ``summary.json``: nnU-Net's scores of the validation cases; ``nnUNetv2_lightnets compare`` reads these folders;
* ``predictions.zip``: the label maps of the test images, whose labels this script does not need: score them with
  ``nnUNetv2_evaluate_folder`` where you have them;
* ``training.json``: budget, patch, batch, parameters and multiply-accumulates, and the machine.

What is there is not done again. The tables of ``docs/accuracy.md`` are computed from these files alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunet_server import Commands
from pages import DOCS, markdown, write_table

from nnunetv2_lightnets.benchmark.analysis import Comparison, Settings, compare
from nnunetv2_lightnets.benchmark.comparable import check_comparable
from nnunetv2_lightnets.benchmark.costs import trainer_costs
from nnunetv2_lightnets.benchmark.results import read_results
from nnunetv2_lightnets.benchmark.setting import Setting
from nnunetv2_lightnets.benchmark.statistics import Interval
from nnunetv2_lightnets.benchmark.worker import find_trainer_class, machine

PLANS = "nnUNetPlansSmall"
MARGIN = 0.01  # decided before any training: one Dice point
RESULTS = Path(__file__).resolve().parent / "results" / "accuracy"
PAGE = DOCS / "accuracy.md"
MACHINE = ("processor", "cores", "threads", "torch")
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
    """

    dataset: str
    configuration: str
    patch: tuple[int, ...] | None
    batch: int
    budget: str
    trainers: tuple[str, ...]
    scans_of_a_subject: int = 1

    @property
    def number(self) -> str:
        """The data set's number."""
        return self.dataset[len("Dataset") :].partition("_")[0]


RUNS = (
    Run("Dataset504_Hippocampus", "3d_fullres", None, 2, "_4epochs_250iters", CONTROLLED, scans_of_a_subject=2),
    Run(
        "Dataset505_DSB2018Nuclei",
        "2d",
        (128, 128),
        4,
        "_2epochs_250iters",
        (*CONTROLLED, "nnUNetTrainerSwinUMambaScratch"),
    ),
)


def prepare(commands: Commands, raw: Path, run: Run) -> None:
    """Plan and preprocess once, write the plans that all trainings share, keep the data set's own split."""
    folder = commands.preprocessed / run.dataset
    if (folder / f"{PLANS}.json").is_file():
        return
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


def train(commands: Commands, run: Run, trainer: str) -> Path:
    """Train (or go on) with validation; returns the folder of the fold."""
    words = (run.dataset, run.configuration, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu")
    fold = commands.results / run.dataset / f"{trainer}__{PLANS}__{run.configuration}" / "fold_0"
    if not (fold / "validation" / "summary.json").is_file():
        commands.must("nnUNetv2_train", *words, *(["--c"] if fold.exists() else []))
    return fold


def predict(commands: Commands, run: Run, trainer: str) -> Path:
    """Predict the test images as nnU-Net does by default, mirrored; returns the folder of label maps."""
    out = commands.folder / "predictions" / run.dataset / trainer
    model = ("-d", run.dataset, "-c", run.configuration, "-f", "0", "-tr", trainer, "-p", PLANS)
    images = commands.raw / run.dataset / "imagesTs"
    commands.must("nnUNetv2_predict", "-i", images, "-o", out, *model, "-device", "cpu", "-npp", "1", "-nps", "1")
    return out


def iterations(trainer: str) -> int:
    """Training steps that a trainer's name promises."""
    found = re.search(r"_(\d+)epochs_(\d+)iters$", trainer)
    assert found is not None
    return int(found[1]) * int(found[2])


def keep(commands: Commands, run: Run, trainer: str, fold: Path, predictions: Path, threads: int) -> None:
    """Write what is kept of a training, last of all what says that it is complete."""
    kept = RESULTS / run.dataset / trainer
    kept.mkdir(parents=True, exist_ok=True)
    description = json.loads((commands.raw / run.dataset / "dataset.json").read_text())
    (kept.parent / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    with zipfile.ZipFile(kept / "predictions.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(predictions.glob(f"*{description['file_ending']}")):
            archive.write(file, file.name)
    plans = json.loads((commands.preprocessed / run.dataset / f"{PLANS}.json").read_text())
    setting = Setting("", plans, description, run.configuration)
    split = json.loads((commands.preprocessed / run.dataset / "splits_final.json").read_text())
    network, parameters, macs = trainer_costs(find_trainer_class(trainer), setting)
    facts = {
        "trainer": trainer,
        "network": network,
        "configuration": run.configuration,
        "patch": list(setting.patch),
        "batch": run.batch,
        "parameters": parameters,
        "macs": macs,
        "iterations": iterations(trainer),
        "cases trained on": len(split[0]["train"]),
    }
    described = machine(torch.device("cpu")) | {"threads": threads}
    facts |= {key: described[key] for key in MACHINE}
    (kept / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    scores = json.loads((fold / "validation" / "summary.json").read_text())
    for case in scores["metric_per_case"]:  # where the files were is nobody's concern
        for key in ("reference_file", "prediction_file"):
            case[key] = Path(case[key]).name
    (kept / "summary.json").write_text(json.dumps(scores, indent=1) + "\n")


def compared(run: Run, folder: Path) -> Comparison | None:
    """The comparison of all that is recorded of a data set with its reference; None without two of them."""
    names = [name + run.budget for name in run.trainers]
    there = [name for name in names if (folder / run.dataset / name / "summary.json").is_file()]
    if len(there) < 2 or there[0] != names[0]:
        return None
    results = read_results([str(folder / run.dataset / name) for name in there])
    check_comparable(results, ["Dice"])
    subjects = {case: f"{(int(case[-3:]) - 1) // run.scans_of_a_subject:03d}" for case in results[0].cases}
    by_subject = subjects if run.scans_of_a_subject > 1 else None
    return compare(results, Settings(("Dice",), MARGIN), subjects=by_subject)


def shown(value: float, interval: Interval | None, sign: str = "") -> str:
    """A Dice in percent, with its interval."""
    text = f"{100 * value:{sign}.1f}"
    return text if interval is None else f"{text} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def table(run: Run, folder: Path) -> list[str]:
    """Markdown: what was trained and how, a row for each network, and the notes of the comparison."""
    comparison = compared(run, folder)
    if comparison is None:
        return [f"{run.dataset}: not trained yet."]
    facts = {name: json.loads((folder / run.dataset / name / "training.json").read_text()) for name in comparison.names}
    overall, structures = comparison.overall("Dice"), comparison.by_structure("Dice")
    rows: list[Mapping[str, Any]] = []
    for i, (score, difference) in enumerate(zip(overall.scores, [None, *overall.differences], strict=True)):
        row = {
            "trainer": score.result.removesuffix(run.budget),
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
    title = (
        f"**{run.dataset}, {run.configuration}**: {one['iterations']} iterations of {one['batch']} patches of "
        f"{'×'.join(map(str, one['patch']))}, {one['cases trained on']} cases to train on, {units} to validate on."
    )
    return [title, "", *markdown(list(dict.fromkeys(key for row in rows for key in row)), rows)]


def write_page(folder: Path) -> None:
    """Put what is recorded on the page."""
    lines: list[str] = []
    for run in RUNS:
        lines += [*table(run, folder), ""]
    write_table(PAGE, Path(__file__).name, lines[:-1])


def main() -> None:
    """Train what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where nnU-Net's folders go")
    parser.add_argument("--raw", type=Path, required=True, help="nnUNet_raw with the data sets of RUNS")
    parser.add_argument("--data", nargs="+", choices=[run.number for run in RUNS], help="all by default")
    parser.add_argument("--trainer", nargs="+", metavar="NAME", help="without suffix; all by default")
    parser.add_argument("--threads", type=int, default=1, help="more may hang forked predictions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    commands = Commands(args.folder.resolve(), threads=args.threads)
    for run in RUNS:
        if args.data and run.number not in args.data:
            continue
        prepare(commands, args.raw.resolve(), run)
        for name in run.trainers:
            trainer = name + run.budget
            if (args.trainer and name not in args.trainer) or (
                RESULTS / run.dataset / trainer / "summary.json"
            ).exists():
                continue
            fold = train(commands, run, trainer)
            keep(commands, run, trainer, fold, predict(commands, run, trainer), args.threads)
            write_page(RESULTS)
    commands.close()


if __name__ == "__main__":
    main()
