"""``nnUNetv2_lightnets compare``: what a light network loses against another one, with what is known about it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_lightnets.errors import LightNetsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments in nnU-Net's style."""
    parser.description = (
        "Compare trained networks on the same cases: means with 95 % intervals, paired differences, Wilcoxon's test "
        "with Holm's correction, ranks, non-inferiority, worst cases. Writes an HTML page, Markdown, LaTeX, CSV, JSON."
    )
    parser.add_argument("results", nargs="+", metavar="[NAME=]FOLDER",
                        help="two or more: trainer folder, fold folder, folder with summary.json, or folder of "
                        "predictions (with -gt); the first is the reference that the others are compared "
                        "with")  # fmt: skip
    parser.add_argument("--reference", metavar="NAME", help="another result than the first as the reference")
    parser.add_argument("-o", type=Path, default=Path("compare"), metavar="FOLDER", help="output (default: ./compare)")
    parser.add_argument("-f", nargs="+", metavar="FOLD",
                        help="folds to read from trainer folders (default: all held out)")  # fmt: skip
    parser.add_argument("-gt", type=Path, metavar="FOLDER", help="reference segmentations, for folders of predictions")
    parser.add_argument("-djfile", type=Path, metavar="FILE", help="dataset.json, where none is found beside the files")
    parser.add_argument("--chill", action="store_true",
                        help="as in nnU-Net: labels without a prediction are not an error")  # fmt: skip
    parser.add_argument("-images", type=Path, metavar="FOLDER", help="images for the pictures of the worst cases")
    parser.add_argument("--metrics", nargs="+", default=["Dice"], metavar="METRIC",
                        help="from summary.json: Dice, IoU (default: Dice)")  # fmt: skip
    parser.add_argument("--nsd", type=float, metavar="MM",
                        help="also normalised surface Dice at this tolerance, in pixels for pictures (needs the "
                        "predictions)")  # fmt: skip
    parser.add_argument("--margin", type=float, default=0.01,
                        help="loss that still counts as non-inferior; decide it before you look (default: 0.01, one "
                        "Dice point)")  # fmt: skip
    parser.add_argument("--empty", choices=("drop", "one"), default="drop",
                        help="cases whose reference lacks a structure: drop them for it (default), or count 1 if the "
                        "prediction lacks it, too, else 0")  # fmt: skip
    parser.add_argument("--subjects", type=Path, metavar="FILE",
                        help="CSV (columns case, subject) or JSON: average the cases of a subject first, for repeated "
                        "scans")  # fmt: skip
    parser.add_argument("--worst", type=int, default=3, metavar="N", help="worst cases shown per result (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("-np", type=int, default=None, metavar="N", help="worker processes (default: nnU-Net's)")


def run(args: argparse.Namespace) -> int:
    """Read, check, compare, write."""
    _check(args)
    # Imported where needed, so that --help and mistakes cost no seconds.
    from nnunetv2.configuration import default_num_processes

    from nnunetv2_lightnets.comparison.comparable import check_comparable
    from nnunetv2_lightnets.comparison.results import read_results, read_subjects
    from nnunetv2_lightnets.comparison.scoring import NSD, add_nsd

    processes = args.np or default_num_processes
    results = read_results(
        args.results, folds=args.f, labels=args.gt, dataset_json=args.djfile, chill=args.chill, processes=processes
    )
    names = [result.name for result in results]
    if args.reference is not None:
        if args.reference not in names:
            raise LightNetsError(f"--reference {args.reference} is none of the results; choose from {', '.join(names)}")
        results.insert(0, results.pop(names.index(args.reference)))
    metrics = [m for m in dict.fromkeys(args.metrics) if m != NSD or args.nsd is None]
    check_comparable(results, metrics)
    if args.nsd is not None:
        add_nsd(results, args.nsd, args.gt, processes)
        metrics.append(NSD)
        check_comparable(results, metrics)

    from nnunetv2_lightnets.comparison.analysis import compare
    from nnunetv2_lightnets.comparison.findings import Settings
    from nnunetv2_lightnets.comparison.report import write_report
    from nnunetv2_lightnets.comparison.volumes import unit_of_spacing
    from nnunetv2_lightnets.comparison.wording import text_summary

    subjects = None if args.subjects is None else read_subjects(args.subjects)
    some_case = next(iter(results[0].cases.values()))
    unit = "mm" if args.nsd is None else unit_of_spacing(some_case.prediction, results[0].dataset_json)
    settings = Settings(tuple(metrics), args.margin, args.empty, args.nsd, unit, args.seed)
    comparison = compare(results, settings, subjects=subjects, worst=args.worst)
    files = write_report(comparison, args.o, labels=args.gt, images=args.images)
    print(text_summary(comparison))
    print("\nWritten: " + ", ".join(str(file) for file in files))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Mistakes that can be told without reading anything."""
    if len(args.results) < 2:
        raise LightNetsError(f"compare needs two or more results, got {len(args.results)}; add another FOLDER")
    if not 0 < args.margin < 1:
        raise LightNetsError(
            f"--margin {args.margin:g} must be between 0 and 1, in units of the metric (0.01 is 1 point)"
        )
    if args.nsd is not None and not 0 < args.nsd < float("inf"):
        raise LightNetsError(f"--nsd {args.nsd:g} must be a tolerance in mm above 0")
    if args.worst < 0:
        raise LightNetsError(f"--worst {args.worst} must be 0 or more")
    if args.np is not None and args.np < 1:
        raise LightNetsError(f"-np {args.np} must be 1 or more")
    if args.seed < 0:
        raise LightNetsError(f"--seed {args.seed} must be 0 or more")
    if args.o.exists() and not args.o.is_dir():
        raise LightNetsError(f"-o {args.o} is a file; choose a folder")
