"""``nnUNetv2_lightnets benchmark``: what networks cost on this machine, beside what their papers say."""

from __future__ import annotations

import argparse
import json
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_lightnets.costs.arguments import add_patch_arguments, check_patch, check_positive
from nnunetv2_lightnets.costs.trainers import BASELINE, find_trainer_class, fitting_trainers
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line, read_json, write_atomically
from nnunetv2_lightnets.nnunet.plans import PLANS, dataset_setting, patch_setting

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from nnunetv2_lightnets.costs.worker import Job

RESULTS = "benchmark.json"
CLAIMS = Path(__file__).with_name("claims.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments in nnU-Net's style."""
    parser.description = (
        "Parameters, multiply-accumulates, memory and seconds of networks on this machine, each measured in a process "
        "of its own, with the papers' claims beside them. Started again, it goes on where it was. Writes an HTML page, "
        "Markdown, CSV and JSON."
    )
    what = parser.add_argument_group("what to measure on: a planned data set, or any patch")
    what.add_argument("-d", metavar="ID", help="data set, planned by nnU-Net")
    what.add_argument("-c", metavar="CONFIGURATION", help="2d, 3d_fullres, ... of the data set")
    what.add_argument("-p", nargs="+", default=[PLANS], metavar="PLANS",
                      help=f"plans (default: {PLANS}); further ones are for {BASELINE} alone")  # fmt: skip
    add_patch_arguments(what, "instead of -d")
    parser.add_argument("-tr", nargs="+", metavar="TRAINER", help=f"trainers (default: {BASELINE} and all that fit)")
    parser.add_argument("-o", type=Path, default=Path("benchmark"), metavar="FOLDER", help="(default: ./benchmark)")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of a training step (default: the plans')")
    parser.add_argument("--volume", type=int, nargs=3, metavar="N",
                        help="slices, height, width of the whole image (default: the median image)")  # fmt: skip
    parser.add_argument("--no-volume", action="store_true", help="do not predict a whole image")
    parser.add_argument("--mirroring", action="store_true", help="predict the whole image with test-time mirroring")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement's repetitions (default 10)")
    parser.add_argument("--dice", type=Path, metavar="FILE",
                        help="compare.json of these trainers, for pictures of Dice against costs")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="measure again what failed before")


def run(args: argparse.Namespace) -> int:
    """Measure what is not yet measured, then write the report."""
    _check(args)
    from tqdm import tqdm

    from nnunetv2_lightnets.costs.report import read_scores, text_table, write_benchmark

    scores = {} if args.dice is None else read_scores(args.dice)
    jobs = _jobs(args)
    args.o.mkdir(parents=True, exist_ok=True)
    benchmark = _start(args.o / RESULTS, next(iter(jobs.values())))

    def write() -> None:
        write_atomically(args.o / RESULTS, json.dumps(benchmark, indent=1) + "\n")

    done = {row["name"] for row in benchmark["rows"] if not (args.retry and "error" in row)}
    for name, job in (bar := tqdm(jobs.items(), unit="network")):
        bar.set_description(name)
        if name not in done:
            row = {"name": name, "trainer": job.trainer, **measure_in_process(job, args.o / "logs" / f"{name}.log")}
            _check_machine(benchmark, row)
            benchmark["rows"] = [r for r in benchmark["rows"] if r["name"] != name] + [row]
            write()
    benchmark["rows"].sort(key=lambda row: list(jobs).index(row["name"]) if row["name"] in jobs else len(jobs))
    write()
    files = write_benchmark(benchmark, args.o, scores)
    print(text_table(benchmark))
    print("\nWritten: " + ", ".join(str(file) for file in [*files, args.o / RESULTS]))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse mistakes that can be told without reading anything."""
    if (args.d is None) == (args.patch is None):
        raise LightNetsError("give either a data set (-d ID -c CONFIGURATION) or a patch (--patch N N N)")
    if args.d is not None and args.c is None:
        raise LightNetsError(f"-d {args.d} needs a configuration, for instance -c 3d_fullres")
    check_patch(args)
    smallest = None if args.volume is None else min(args.volume)
    check_positive({"--batch-size": args.batch_size, "--threads": args.threads, "--volume": smallest})
    if not 0 < args.seconds < float("inf"):
        raise LightNetsError(f"--seconds must be above 0, got {args.seconds:g}")


def _jobs(args: argparse.Namespace) -> dict[str, Job]:
    """What to measure, by the name of its row."""
    from nnunetv2_lightnets.costs.worker import Job

    if args.d is not None:
        settings = [dataset_setting(args.d, args.c, plans) for plans in args.p]
    else:
        settings = [patch_setting(args.patch, args.channels, args.classes, volume=args.volume)]
    dims = len(settings[0].patch)
    trainers = list(dict.fromkeys(args.tr or [BASELINE, *fitting_trainers(dims)]))
    for trainer in args.tr or []:
        find_trainer_class(trainer)  # a wrong name is told now, not after an hour
    claims = json.loads(CLAIMS.read_text(encoding="utf-8"))
    jobs = {}
    for i, setting in enumerate(settings):
        for trainer in trainers:
            if i > 0 and trainer != BASELINE:
                continue
            name = trainer if i == 0 else f"{trainer}__{args.p[i]}"
            jobs[name] = Job(
                trainer=trainer,
                setting=setting,
                batch_size=args.batch_size or setting.batch_size,
                volume=None if args.no_volume else tuple(args.volume or setting.volume),
                device=args.device,
                threads=args.threads,
                seconds=args.seconds,
                mirroring=args.mirroring,
                claims=[c for c in claims if c["trainer"] == trainer and len(c["patch"]) == dims and i == 0],
            )
    return jobs


def _start(file: Path, job: Job) -> dict[str, Any]:
    """A new benchmark, or the one in the file if it is of the settings of the first job."""
    settings = {
        "title": job.setting.title,
        "patch": list(job.setting.patch),
        "batch size": job.batch_size,
        "volume": job.volume and list(job.volume),
        "mirroring": job.mirroring,
        "device": job.device,
        "threads": job.threads,
        "seconds": job.seconds,
    }
    if not file.exists():
        return {"settings": settings, "machine": None, "rows": []}
    before = read_json(file, "this is no benchmark, choose another folder with -o")
    try:
        others = [f"{k} {before['settings'][k]}" for k, v in settings.items() if before["settings"][k] != v]
    except (KeyError, TypeError) as error:
        raise LightNetsError(f"{file} is no benchmark; choose another folder with -o") from error
    if others:
        raise LightNetsError(f"{file} is a benchmark of other settings ({', '.join(others)}); choose another -o")
    return before


def _check_machine(benchmark: dict[str, Any], row: dict[str, Any]) -> None:
    """Rows of different machines do not belong into one table."""
    if (machine := row.pop("machine", None)) is None:
        return
    if benchmark["machine"] not in (None, machine):
        changed = [f"{k} {v}" for k, v in benchmark["machine"].items() if machine.get(k) != v]
        raise LightNetsError(f"the earlier rows were measured with {', '.join(changed)}; choose another folder with -o")
    benchmark["machine"] = machine


def measure_in_process(job: Job, log: Path) -> dict[str, Any]:
    """The row of a job, measured in a process of its own that prints into ``log``; or ``{"error": reason}``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "job.pkl"), Path(folder, "row.json")
        question.write_bytes(pickle.dumps(job))
        with open(log, "w", encoding="utf-8") as output:
            done = subprocess.run(
                [sys.executable, "-m", "nnunetv2_lightnets.costs.worker", str(question), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode == 0 and answer.exists():
            row: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return row
    if done.returncode < 0:
        names = {known.value: known.name for known in signal.Signals}
        name = names.get(-done.returncode, f"signal {-done.returncode}")
        memory = ", for lack of memory perhaps" if name == "SIGKILL" else ""
        return {"error": f"ended by {name}{memory}"}
    if done.returncode == 0:
        return {"error": "the process ended without a result"}
    error = last_line(log.read_text(encoding="utf-8", errors="replace"))  # at the end of a traceback
    return {"error": error.removeprefix("nnunetv2_lightnets.errors.LightNetsError: ")}
