"""Time of every network beside other busy processes, with the waiting of threads that our commands set, and without.

    python benchmarks/under_load.py [--trainers NAME ...] [--repeats 5] [--seconds 30] [--side 128 512 64 256]

Takes some 25 minutes on a machine that does nothing else. Networks compute with two threads, in a process of their own
for each way of waiting (it is read when torch is loaded): one patch as nnU-Net's predictor does, and one training step
of two patches. They take turns: quiet, beside one process that only counts, beside two. A goal of "2.2 times" is that
of two threads on two processors that get two thirds of them, and some. At last nnU-Net's whole ``nnUNetv2_predict`` of
five cases, with its own workers and no others. Writes ``benchmarks/results/under_load.csv``: seconds of the clock and
of the processor, medians.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from network_costs import LIGHT_M
from nnunet_server import Commands
from recording import RESULTS, Record, Tables, argument_parser, link, machine, read_rows, table

from nnunetv2_lightnets.costs.trainers import BASELINE
from nnunetv2_lightnets.discovery.huge_pages import VARIABLE as HUGE_PAGES
from nnunetv2_lightnets.discovery.waiting import SETTINGS, SWITCH, VARIABLES

MEASURED = RESULTS / "under_load.csv"
PAGE = "docs/memory.md"
THREADS = 2
SETTLE = 0.3  # seconds until a process that was started is busy
LOADS = (0, 1, 2)  # busy processes
CLASSES = 3
CNNS = ("nnUNetTrainerULite", "nnUNetTrainerUltraLightUNet")
SWIN = ("nnUNetTrainerSwinUMambaScratch", "nnUNetTrainerSwinUMambaDScratch")
TRAINERS = {3: (BASELINE, *LIGHT_M, *CNNS, "nnUNetTrainerUMambaBot")}
TRAINERS[2] = (*TRAINERS[3], *SWIN)
SIDES = (128, 512, 64, 256)  # of a patch that is predicted, in 3D and in 2D, and of one that is trained with
FORWARD, STEP, COMMAND = "prediction of a patch", "training step", "nnUNetv2_predict"
OURS, TORCHS = "as our commands set it", "as torch comes"
WAYS: dict[str, dict[str, str]] = {OURS: SETTINGS, TORCHS: {}}
KEY = ("trainer", "what", "patch", "waiting", "busy processes")
FACTS = ("threads", "cores", "processor", "torch")
PREDICTED, CASES = "nnUNetTrainerLightMUNetS", 5


# ---- One network, in a process of its own ----


def prepare(trainer: str, what: str, patch: Sequence[int]) -> Callable[[], Any]:
    """What is timed."""
    import torch

    from nnunetv2_lightnets.costs.trainers import find_trainer_class
    from nnunetv2_lightnets.costs.worker import Job, predictor
    from nnunetv2_lightnets.nnunet.folders import temporary_folders
    from nnunetv2_lightnets.nnunet.plans import patch_setting
    from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer

    torch.set_num_threads(THREADS)
    found, setting, device = find_trainer_class(trainer), patch_setting(patch, 1, CLASSES), torch.device("cpu")
    if what == FORWARD:
        job = Job(trainer, setting, 1, None, "cpu", THREADS, 0, False)
        network, x = predictor(found, job, device).network, torch.randn(1, 1, *setting.patch)

        def predict() -> None:
            with torch.inference_mode():
                network(x)

        return predict
    with temporary_folders() as folder:
        made = make_trainer(found, setting, 2, folder, device)
    batch = make_batch(made, setting.patch, 2)
    made.network.train()
    return lambda: made.train_step(batch)


def serve(trainer: str, what: str, patch: Sequence[int]) -> None:
    """Run once for every line of the input, and answer with seconds of the clock and of the processor."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare(trainer, what, patch)
        for _ in range(2):  # from the second on, freed memory is kept
            run()
    print("ready", flush=True)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.process_time()
        run()
        print(time.perf_counter() - clock, time.process_time() - processor, flush=True)


class Served:
    """A network in a process of its own that waits in one of the ways."""

    def __init__(self, trainer: str, what: str, patch: Sequence[int], way: str) -> None:
        words = [trainer, what, json.dumps(list(patch))]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(way) | {"OMP_NUM_THREADS": str(THREADS)},
        )

    def wait(self) -> None:
        """Until it is ready."""
        self._answer()

    def run(self) -> tuple[float, float]:
        """Seconds of the clock and of the processor."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        clock, processor = map(float, self._answer().split())
        return clock, processor

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def environment(way: str) -> dict[str, str]:
    """Of a process whose threads wait in one of the ways, with tensors in huge pages as in our commands."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {HUGE_PAGES: "1"} | WAYS[way]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes count as long as this lasts."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(SETTLE if processes else 0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


# ---- All of them ----


def measure(
    trainer: str, what: str, patch: Sequence[int], ways: Sequence[str], repeats: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each way and load. A way that has taken ``seconds`` is measured no more."""
    served = {way: Served(trainer, what, patch, way) for way in ways}
    for process in served.values():
        process.wait()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(way, load): [] for way in ways for load in LOADS}
    taken = dict.fromkeys(ways, 0.0)
    for _ in range(repeats):
        going_on = [way for way in ways if taken[way] < seconds]
        for load in LOADS:
            with busy(load):
                for way in going_on:
                    found[way, load].append(served[way].run())
                    taken[way] += found[way, load][-1][0]
    for process in served.values():
        process.close()
    for way in ways:
        clocks, processors = ({load: median(found[way, load], i) for load in LOADS} for i in (0, 1))
        for load in LOADS:
            names = (trainer, what, "×".join(map(str, patch)), way, load)
            yield dict(zip(KEY, names, strict=True)) | {
                "seconds": f"{clocks[load]:.3f}",
                "CPU seconds": f"{processors[load]:.3f}",
                "times quiet": f"{clocks[load] / clocks[0]:.2f}",
                "CPU times quiet": f"{processors[load] / processors[0]:.2f}",
                "runs": len(found[way, load]),
            }


def median(runs: Sequence[tuple[float, float]], which: int) -> float:
    """Of the clock (0) or of the processor (1)."""
    return statistics.median(run[which] for run in runs)


def cases(chosen: Sequence[str] | None, sides: Sequence[int]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Trainer, what it does, and its patch."""
    for dims in (3, 2):
        for what, side in ((FORWARD, sides[3 - dims]), (STEP, sides[5 - dims])):
            for trainer in chosen or TRAINERS[dims]:
                if trainer in TRAINERS[dims]:
                    yield trainer, what, (side,) * dims


# ---- nnUNetv2_predict ----


def make_model(commands: Commands, patch: Sequence[int]) -> Path:
    """A trained folder with random weights, and five images of noise, twice the patch along each axis."""
    import numpy as np
    import SimpleITK as sitk
    import torch

    from nnunetv2_lightnets.costs.trainers import find_trainer_class
    from nnunetv2_lightnets.nnunet.folders import temporary_folders
    from nnunetv2_lightnets.nnunet.plans import patch_setting
    from nnunetv2_lightnets.nnunet.rehearsal import make_trainer

    setting = patch_setting(patch, 1, CLASSES)
    setting.plans["foreground_intensity_properties_per_channel"] = {"0": {}}  # only CT would be normalised by them
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):  # as nnU-Net plans them
        setting.plans["configurations"][setting.configuration] |= {
            f"resampling_fn_{what}": "resample_data_or_seg_to_shape",
            f"resampling_fn_{what}_kwargs": {
                "is_seg": what == "seg",
                "order": order,
                "order_z": 0,
                "force_separate_z": None,
            },
        }
    with temporary_folders() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(find_trainer_class(PREDICTED), setting, 2, folder, torch.device("cpu"))
        name = f"{PREDICTED}__{setting.plans['plans_name']}__{setting.configuration}"
        model = commands.results / setting.plans["dataset_name"] / name
        (model / "fold_0").mkdir(parents=True)
        trainer.save_checkpoint(str(model / "fold_0" / "checkpoint_final.pth"))
    (model / "plans.json").write_text(json.dumps(setting.plans))
    (model / "dataset.json").write_text(json.dumps(setting.dataset_json))
    images = commands.folder / "images"
    images.mkdir()
    for number in range(CASES):
        noise = np.random.default_rng(number).normal(size=[2 * side for side in patch]).astype(np.float32)
        sitk.WriteImage(
            sitk.GetImageFromArray(noise), str(images / f"case{number}_0000{setting.dataset_json['file_ending']}")
        )
    return model


def predict(patch: Sequence[int], ways: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each way: five cases with nnU-Net's own command, as installed, whose workers start with it."""
    with tempfile.TemporaryDirectory(prefix="lightnets_") as folder:
        commands = Commands(Path(folder), threads=THREADS, warm=False)
        model = make_model(commands, patch)
        trainer, plans, configuration = model.name.split("__")
        words = ("-d", model.parent.name, "-tr", trainer, "-p", plans, "-c", configuration, "-f", "0")
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for turn in range(repeats):
            for way in ways:
                out = commands.folder / f"out{turn}{ways.index(way)}"
                off = {SWITCH: "off" if way == TORCHS else ""} | (WAYS[way] if way not in (OURS, TORCHS) else {})
                clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                done = commands.run(COMMAND, "-i", commands.folder / "images", "-o", out, *words, "-device", "cpu",
                                    "--disable_tta", **off)  # fmt: skip
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                if done.code:
                    raise RuntimeError(done.stderr[-4000:])
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                found[way].append((time.perf_counter() - clock, spent))
    for way in ways:
        row = dict(zip(KEY, (trainer, COMMAND, "×".join(map(str, patch)), way, "its own"), strict=True))
        seconds = {"seconds": f"{median(found[way], 0):.3f}", "CPU seconds": f"{median(found[way], 1):.3f}"}
        yield row | seconds | {"times quiet": "", "CPU times quiet": "", "runs": len(found[way])}


# ---- Pages ----


def tables() -> Tables:
    """Networks in 3D with our waiting, and beside one busy process with torch's; then the whole command."""
    rows = read_rows(MEASURED)
    by_name = {tuple(row[column] for column in KEY): row for row in rows}
    if not rows:
        return {PAGE: ["Nothing is recorded yet: `python benchmarks/under_load.py` measures it."]}
    shown = []
    patches = {row["patch"] for row in rows if row["what"] == FORWARD and row["patch"].count("×") == 2}
    for trainer in TRAINERS[3]:
        for patch in patches:
            of = {(way, load): by_name.get((trainer, FORWARD, patch, way, str(load))) for way in WAYS for load in LOADS}
            quiet, others = of[OURS, 0], [of[OURS, load] for load in LOADS[1:]]
            if quiet is None or None in others:
                continue
            shown.append({"trainer": f"`{trainer}`", f"a patch of {patch} (s), quiet": quiet["seconds"]})
            for load, row in zip(LOADS[1:], others, strict=True):
                assert row is not None
                shown[-1][f"beside {load}"] = f"{row['times quiet']}×, CPU {row['CPU times quiet']}×"
            if (waits := of[TORCHS, 1]) is not None:
                shown[-1]["beside 1, waiting as torch comes"] = (
                    f"{waits['times quiet']}×, CPU {waits['CPU times quiet']}×"
                )
    about = ", ".join(f"{fact} {rows[0][fact]}" for fact in FACTS)
    lines = [f"Measured with: {about}.", "", *table(shown), ""]
    beside = [row for row in rows if row["what"] != COMMAND]
    lines += [range_of(way, beside) for way in WAYS if any(row["waiting"] == way for row in beside)]
    whole = [row for row in rows if row["what"] == COMMAND]
    lines += [
        f"* `{COMMAND}` of {CASES} cases, `{row['trainer']}`, patch {row['patch']}, waiting {row['waiting']}: "
        f"{float(row['seconds']):.0f} s, {float(row['CPU seconds']):.0f} s of CPU"
        for row in whole
    ]
    return {PAGE: [*lines, "", link(PAGE, MEASURED, "All networks, training steps and images")]}


def range_of(way: str, rows: Sequence[dict[str, str]]) -> str:
    """A line: how much longer prediction and training took beside others, over all trainers and patches."""
    found = []
    for load in LOADS[1:]:
        of = [row for row in rows if row["waiting"] == way and row["busy processes"] == str(load)]
        clock, processor = ([float(row[column]) for row in of] for column in ("times quiet", "CPU times quiet"))
        found.append(
            f"beside {load} {min(clock):.1f} to {max(clock):.1f} times the quiet time (median "
            f"{statistics.median(clock):.1f}) and up to {max(processor):.1f} times its CPU time"
        )
    return f"* Waiting {way}, {len(of)} patches and steps of all these trainers, in 3D and 2D: {'; '.join(found)}"


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--trainers", nargs="+", help="these alone; nnUNetv2_predict is left out then")
    parser.add_argument("--waiting", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="these ways alone")
    parser.add_argument("--repeats", type=int, default=5, help="turns, at most")
    parser.add_argument("--seconds", type=float, default=30, help="for the turns of a network and way, about")
    parser.add_argument("--side", type=int, nargs=4, default=SIDES, help="voxels: predicted in 3D and 2D, trained")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--predict", action="store_true", help="nnUNetv2_predict alone")
    parser.add_argument(
        "--spins", nargs="+", help="values of GOMP_SPINCOUNT to compare in place of both ways; see --out"
    )
    parser.add_argument("--serve", nargs=3, help="trainer, what, and patch, in this process; what main() calls")
    arguments = parser.parse_args()
    if arguments.serve:
        trainer, what, patch = arguments.serve
        serve(trainer, what, json.loads(patch))
        return
    if arguments.spins:
        WAYS.clear()
        WAYS.update({f"GOMP_SPINCOUNT={spins}": {"GOMP_SPINCOUNT": spins} for spins in arguments.spins})
        arguments.waiting = tuple(WAYS)
    import torch

    torch.set_num_threads(THREADS)  # for the description alone
    record, facts = Record(arguments.out, *KEY), machine(*FACTS)
    if not arguments.predict:
        for case in cases(arguments.trainers, arguments.side):
            record.put(*(r | facts for r in measure(*case, arguments.waiting, arguments.repeats, arguments.seconds)))
    if not arguments.trainers:
        patch = (arguments.side[2],) * 3
        record.put(*(row | facts for row in predict(patch, arguments.waiting, min(2, arguments.repeats))))


if __name__ == "__main__":
    main()
