"""The benchmark for GPUs, on a CPU: its rows, budgets, byte counts and page; and a dry run of all sections."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu
import pytest
import recording
import torch
from gpu_sections import networks, operators, page, speed, training, values
from gpu_sections.bench import NO_TIME, NOTE, RESTART, STARTED, Bench, Rows, Table, captured, timed

from nnunetv2_lightnets import files
from nnunetv2_lightnets.errors import LightNetsError

SCRIPT = recording.ROOT / "benchmarks" / "gpu.py"
TABLE = Table("rows.csv", ("network", "way"), ("ms",))
CPU = torch.device("cpu")


def rows_in(folder: Path, seconds: float = 60) -> Rows:
    return Rows(TABLE, folder, time.time() + seconds)


def recorded(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["network"], row["way"]): row for row in recording.read_rows(folder / TABLE.file)}


# ---- Rows ----


def test_a_row_is_recorded_before_and_after_it_is_measured(tmp_path: Path) -> None:
    def compute() -> Mapping[str, Any]:
        assert recorded(tmp_path)["a", "AMP"][NOTE] == STARTED
        return {"ms": 3}

    rows_in(tmp_path).measure(("a", "AMP"), compute, 1)
    row = recorded(tmp_path)["a", "AMP"]
    assert (row["ms"], row[NOTE]) == ("3", "")
    assert float(row["row s"]) >= 0


def test_a_row_that_does_not_fit_is_not_run_until_there_is_time(tmp_path: Path) -> None:
    rows_in(tmp_path, seconds=10).measure(("a", "AMP"), lambda: pytest.fail("it ran"), 11)
    assert recorded(tmp_path)["a", "AMP"][NOTE] == NO_TIME
    rows_in(tmp_path).measure(("a", "AMP"), lambda: {"ms": 1}, 11)
    assert recorded(tmp_path)["a", "AMP"]["ms"] == "1"


def test_a_measured_row_is_not_measured_again(tmp_path: Path) -> None:
    rows_in(tmp_path).measure(("a", 1), lambda: {"ms": 1}, 1)
    rows_in(tmp_path).measure(("a", 1), lambda: pytest.fail("it ran"), 1)
    assert recorded(tmp_path)["a", "1"]["ms"] == "1"


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory"),
        (
            LightNetsError("the forced scan backend 'x' cannot take this call"),
            "the forced scan backend 'x' cannot take",
        ),
        (KeyError("maxnreg"), "KeyError: 'maxnreg'"),
        (RuntimeError("first line\nlast line"), "RuntimeError: last line"),
    ],
)
def test_what_fails_is_the_note_of_its_row(error: Exception, note: str, tmp_path: Path) -> None:
    def fails() -> Mapping[str, Any]:
        raise error

    rows = rows_in(tmp_path)
    rows.measure(("a", "AMP"), fails, 1)
    rows.measure(("b", "AMP"), lambda: {"ms": 1}, 1)
    assert recorded(tmp_path)["a", "AMP"][NOTE].startswith(note)
    assert recorded(tmp_path)["b", "AMP"]["ms"] == "1"


def test_a_process_whose_device_is_unusable_asks_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_sections.bench.usable", lambda: False)
    with pytest.raises(SystemExit) as left:
        rows_in(tmp_path).measure(("a", "AMP"), lambda: {"ms": 1}, 1)
    assert left.value.code == RESTART
    assert recorded(tmp_path)["a", "AMP"]["ms"] == "1"


# ---- Processes ----


def test_a_section_goes_on_after_a_process_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter([-11, RESTART, 0])
    rows = Rows(values.TABLE, tmp_path, 0)

    def process(section: str, folder: Path, until: float, dry_run: bool) -> int:
        status = next(statuses)
        if status == -11:
            rows.put(("scan", "first", "triton", "float32"), note=STARTED)
        return status

    monkeypatch.setattr(gpu, "run_process", process)
    assert gpu.run_section("a", tmp_path, gpu.parsed([]))
    assert [row[NOTE] for row in recording.read_rows(tmp_path / "values.csv")] == ["its process died, exit status -11"]
    assert next(statuses, None) is None


def test_a_section_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(*_: object) -> None:
        Rows(speed.TABLE, tmp_path, 0).put(("scan", "large", "float32", "forward", "triton"), note=STARTED)

    monkeypatch.setattr(gpu, "run_process", process)
    assert gpu.run_section("b", tmp_path, gpu.parsed([]))
    assert [row[NOTE] for row in recording.read_rows(tmp_path / "speed.csv")] == ["it took too long"]


def test_a_section_whose_process_dies_between_rows_has_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "run_process", lambda *_: 1)
    assert not gpu.run_section("c", tmp_path, gpu.parsed([]))
    assert "section c broke off: its process died, exit status 1" in capsys.readouterr().err


def test_choices_by_measurement_are_among_the_results(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with gpu.kept_choices(tmp_path):
            file = files.cache_folder() / "tuning.json"
            assert file.is_file() == (content == "second")
            file.write_text(content)
        assert (tmp_path / "tuning.json").read_text() == content


@pytest.mark.parametrize(("words", "kept"), [([], False), (["--continue"], True)])
def test_recorded_rows_are_kept_only_if_asked_for(
    words: list[str], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Rows(values.TABLE, tmp_path, 0).put(("scan", "first", "triton", "float32"), ok="yes")
    monkeypatch.setattr(gpu, "run_process", lambda *_: 0)
    gpu.run_section("a", tmp_path, gpu.parsed(words))
    assert (tmp_path / "values.csv").is_file() == kept


def test_a_stopped_process_takes_its_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 3)
    assert gpu.run_process("a", tmp_path, 0, dry_run=True) is None
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child lives")


# ---- Measuring ----


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # u, delta and y of 64 channels, B and C of 16 states
        (operators.Scan(1, 64, 1_000), 3 * 64_000 + 2 * 16_000, 3 * 64_000 + 2 * 16_000 + 2 * 64_000 + 2 * 16_000),
        # u and y once, delta, B and C of four directions
        (operators.Scan(1, 8, 12, image=(3, 4)), (2 + 4) * 96 + 8 * 192, (2 + 4) * 96 + 8 * 192 + 5 * 96 + 8 * 192),
        (operators.Convolution(2, 8, 100), 2 * 1_600, 3 * 1_600),
        (operators.Norm(2, 8, 100), 2 * 1_600, 3 * 1_600),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_needed_bytes_are_tokens_read_and_written_once(
    case: operators.Case, forward: int, backward: int, dtype: torch.dtype, size: int
) -> None:
    assert case.needed_bytes(dtype) == (size * forward, size * backward)


@pytest.mark.parametrize("layout", operators.LAYOUTS)
def test_layouts_change_strides_and_no_value(layout: str) -> None:
    x = torch.randn(2, 4, 5)
    found = operators.laid_out(x, layout)
    assert torch.equal(found, x)
    assert found.stride(-1 if layout == "columns" else -2) == 1
    assert found.stride(-1) == {"rows": 4, "columns": 1, "slices": 12}[layout]


def test_the_same_numbers_are_drawn_in_every_dtype() -> None:
    case = operators.Scan(1, 4, 6, gate=True, state=True)
    single, half = (case.inputs(dtype, CPU, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert [x.dtype for x in half] == [
        torch.float32 if x.ndim < 3 or i == 8 else torch.bfloat16 for i, x in enumerate(half)
    ]
    assert all(torch.equal(x.bfloat16(), y.bfloat16()) for x, y in zip(single[:2], half[:2], strict=True))
    assert len(case.names) == len(half)


def test_nan_is_never_right() -> None:
    error = values.relative_error(torch.tensor([1.0, math.nan]), torch.ones(2))
    assert math.isnan(error)
    assert values.judged(error, 0, "du", (1e-5, 1e-5))["ok"] == "no"
    assert values.judged(0, math.nan, "du", (1e-5, 1e-5))["ok"] == "no"
    assert values.judged(1e-6, None, "", (1e-5, None))["ok"] == "yes"


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = operators.Convolution(1, 8, 20)
    assert values.compare(case, operators.CHOSEN, "float32", CPU)["ok"] == "yes"
    right = operators.causal_conv1d
    monkeypatch.setattr(
        operators,
        "causal_conv1d",
        lambda x, *rest, **how: right(x, *rest, **how) * (1 + 1e-3 * (x.dtype != torch.float64)),
    )
    found = values.compare(case, operators.CHOSEN, "float32", CPU)
    assert (found["ok"], float(found["output error"])) == ("no", pytest.approx(1e-3, rel=0.1))


def test_slow_calls_are_repeated_less() -> None:
    calls: list[float] = []
    timing = timed(lambda: calls.append(time.sleep(0.05)), CPU, 20, most_seconds=0.2)  # type: ignore[func-returns-value]
    assert 1 <= timing.rounds <= 4
    assert len(calls) == timing.rounds + 2
    assert timing.median >= 0.05


class Device:
    """CUDA's events, streams and graphs by a clock that calls advance; ``log`` is what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, list[str]()

        class Event:
            def __init__(event, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(event) -> None:
                event.at = self.now

            def elapsed_time(event, other: Any) -> float:
                return 1e3 * float(other.at - event.at)

        class Stream:
            def __init__(stream, device: object = None) -> None: ...

            def wait_stream(stream, other: object) -> None:
                self.log.append("wait")

        class Graph:
            def replay(graph) -> None:
                self.log.append("replay")

        @contextmanager
        def scope(name: str) -> Iterator[None]:
            self.log.append(f"{name} begins")
            yield
            self.log.append(f"{name} ends")

        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "synchronize": lambda *_: None,
            "current_stream": Stream,
            "stream": lambda _: scope("stream"),
            "graph": lambda _: scope("graph"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self) -> None:
        self.now += 0.002
        self.log.append("call")


def test_on_a_device_time_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timing = timed(device.call, torch.device("cuda"), 20)
    assert (timing.median, timing.rounds) == (pytest.approx(0.002), 20)
    assert device.log == ["call"] * 22


def test_on_a_device_a_call_is_captured_after_two_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    captured(device.call, torch.device("cuda"))()
    assert device.log == [
        *("wait", "stream begins", "call", "call", "stream ends", "wait"),
        *("graph begins", "call", "graph ends", "replay"),
    ]


def test_without_cuda_a_captured_call_is_the_call() -> None:
    calls: list[int] = []
    captured(lambda: calls.append(1), CPU)()
    assert calls == [1]


def test_every_main_network_has_a_size_and_a_name_without_nnunet() -> None:
    assert {dims for _, dims in networks.MAIN} == set(networks.SIZES)
    assert {trainer for trainer, _ in networks.MAIN} == {*networks.BY_TRAINER, networks.BASELINE}
    assert networks.SIZES == {3: ((128, 128, 128), 2), 2: ((512, 512), 12)}


# ---- Command ----


def test_without_a_cuda_device_there_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", str(tmp_path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.py: nothing to measure: torch sees no CUDA device; --dry-run needs none\n"


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu.parsed(["--only", "a,e"])
    assert left.value.code == 2
    assert "--only names e; sections are a, b, c, d" in capsys.readouterr().err


def test_a_cards_name_is_that_of_a_folder() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "NVIDIA-H100-80GB-HBM3"
    assert gpu.slug("GeForce RTX 4090 (Laptop)") == "GeForce-RTX-4090-Laptop"


# ---- Page ----


def card(folder: Path, name: str, day: str) -> Path:
    folder.mkdir(parents=True)
    known = {"card": name, "driver": "580", "torch": "2.11", "Triton": "3.6", "copy bandwidth, GB/s": 3000, "date": day}
    (folder / page.MACHINE).write_text(json.dumps(known))
    right = Rows(values.TABLE, folder, 0)
    kept = {
        "output error": "1e-07",
        "gradient error": "2e-07",
        "worst": "dA",
        "tolerance": "1e-05 / 1e-05",
        "ok": "yes",
    }
    right.put(("scan", "large", "triton", "float32"), **kept)
    right.put(("scan", "small", "triton", "float32"), **kept | {"gradient error": "0.5", "ok": "no"})
    right.put(("ulite", "8×8", "AMP", "autocast"), note=NO_TIME)
    fast = Rows(speed.TABLE, folder, 0)
    for i in range(9):
        for way, ms in (("chosen", "2"), ("torch", "20")):
            fast.put(
                ("scan", f"case {i}", "float32", "forward", way), **{"ms": ms, "graph ms": "1", "%": "60", "goal %": 50}
            )
    costs = Rows(networks.TABLE, folder, 0)
    for trainer, seconds in (("nnUNetTrainer", "0.2"), ("nnUNetTrainerULite", "0.05")):
        costs.put((networks.STEP, trainer, "128×128×128", 2, "AMP"), **{"seconds": seconds, "peak MB": 8123})
    costs.put((networks.STEP, "nnUNetTrainerLightMUNet", "128×128×128", 2, "AMP"), note="out of memory")
    learnt = Rows(training.TABLE, folder, 0)
    for epoch, dice in ((1, "0.5"), (2, "0.8"), (training.ALL, "0.7")):
        learnt.put(("nnUNetTrainer", epoch), minutes="1.0", iterations=50, Dice=dice)
    return folder


def test_the_page_sums_up_what_is_recorded(tmp_path: Path) -> None:
    text = "\n".join(page.page(card(tmp_path / "card", "NVIDIA H100", "2026-12-01")))
    assert "# NVIDIA H100" in text
    assert "| scan | float32 | 1 | 1 | 0 | 1e-07 | 0.5 |" in text
    assert "* scan, small, triton, float32: wrong: 1e-07 / 0.5" in text
    assert "* 1 rows were not run" in text
    assert "| scan | case 8 | float32 | forward | 1 | 60 | ≥ 50 | 1 |" in text
    assert "| `nnUNetTrainerULite` | 128×128×128 | 2 | 50.0 | 0.25× | 8,123 |" in text
    assert "| `nnUNetTrainerLightMUNet` | 128×128×128 | 2 | out of memory |" in text
    assert "| `nnUNetTrainer` | 1.0 | 50 | 0.7 | 0.8 |  |" in text


def test_an_empty_folder_has_a_page_too(tmp_path: Path) -> None:
    assert "\n".join(page.page(tmp_path)).count("Not measured.") == 5


def test_the_documentation_says_that_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RECORDED", tmp_path)
    assert gpu.tables() == {"docs/gpu.md": ["Not measured on a GPU yet."]}


def test_the_documentation_shows_the_latest_card_and_links_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card(tmp_path / "A100", "A100", "2027-01-01")
    card(tmp_path / "H100", "H100", "2026-12-01")
    monkeypatch.setattr(gpu, "RECORDED", tmp_path)
    lines = gpu.tables()["docs/gpu.md"]
    assert lines[0].startswith("A100, driver 580, torch 2.11, Triton 3.6, a copy moves 3000 GB/s; 2027-01-01")
    assert "Values: 1 right, 1 wrong." in lines
    assert lines[-1].endswith(
        "[H100](../benchmarks/results/gpu/H100/README.md), [A100](../benchmarks/results/gpu/A100/README.md)."
    )
    tables = [line for line in lines if line.startswith("| scan")]
    assert len(tables) == recording.MOST_ROWS


# ---- On a bare machine, and as a whole ----

BLOCKED = (
    *("nnunetv2", "batchgenerators", "batchgeneratorsv2", "SimpleITK", "nibabel", "acvl_utils", "blosc2", "cc3d"),
    *("dynamic_network_architectures", "pooch", "yacs", "graphviz", "imagecodecs", "monai", "nilearn", "mambapy"),
    *("safetensors", "requests"),
)
# Nothing of ours is installed either: no finder of an editable installation.
BARE = f"""
import sys

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def ours(finder):
    name = getattr(finder, "__module__", "") + getattr(finder, "__name__", "")
    return "editable" in name

sys.meta_path[:] = [Blocked, *(finder for finder in sys.meta_path if not ours(finder))]
"""


def dry_run(folder: Path, *words: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if bare:
        (folder / "bare").mkdir()
        (folder / "bare" / "sitecustomize.py").write_text(BARE)
        environment["PYTHONPATH"] = str(folder / "bare")
    words = ("--dry-run", "--out", str(folder), *words)
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, check=False, timeout=800
    )
    print(done.stdout[-5000:], done.stderr[-5000:])
    return done


def test_a_bare_machine_imports_all_sections(tmp_path: Path) -> None:
    code = BARE + (
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu\nfrom gpu_sections import networks, speed, training, values\n"
        "assert networks.without_nnunet() == \"No module named 'nnunetv2'\"\n"
        "import nnunetv2_lightnets.trainers, nnunetv2_lightnets.plans\n"
        "print(nnunetv2_lightnets.trainers.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(recording.ROOT / "trainers" / "__init__.py")


@pytest.mark.slow
def test_a_dry_run_goes_through_all_sections(tmp_path: Path) -> None:
    done = dry_run(tmp_path)
    assert done.returncode == 0
    assert json.loads((tmp_path / page.MACHINE).read_text())["dry run"] is True
    for table in page.TABLES:
        rows = recording.read_rows(tmp_path / table.file)
        assert rows
        assert {row[NOTE] for row in rows} <= {"", "in profile.txt"}, table.file
    ways = {row["way"] for row in recording.read_rows(tmp_path / values.TABLE.file)}
    assert ways >= {"chosen", "triton", "torch", "CUDA graph", "float32", "AMP", "prediction", "compiled"}
    learnt = recording.read_rows(tmp_path / training.TABLE.file)
    assert {row["trainer"] for row in learnt} == set(training.TOY_TRAINERS)
    assert all(float(row["training loss"]) and float(row["Dice"]) >= 0 for row in learnt)
    text = (tmp_path / page.PAGE).read_text()
    assert "Not measured." not in text
    assert "nnUNetTrainerLightMUNetS, one training step" in (tmp_path / "profile.txt").read_text()


@pytest.mark.slow
def test_a_dry_run_on_a_bare_machine_says_what_is_missing(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--only", "c,d", bare=True)
    assert done.returncode == 0
    missing = "nnU-Net is missing: No module named 'nnunetv2'"
    rows = recording.read_rows(tmp_path / networks.TABLE.file)
    assert {row[NOTE] for row in rows if row["trainer"] == networks.BASELINE} == {missing}
    assert all(
        row["seconds"] for row in rows if row["trainer"] != networks.BASELINE and row["what"] != networks.PROFILE
    )
    assert [row[NOTE] for row in recording.read_rows(tmp_path / training.TABLE.file)] == [missing]


def test_a_training_without_data_says_what_it_needs(tmp_path: Path) -> None:
    arguments = gpu.parsed([])
    training.run(Bench(Rows(training.TABLE, tmp_path, time.time() + 60), CPU, False, arguments))
    assert [row[NOTE] for row in recording.read_rows(tmp_path / training.TABLE.file)] == [training.NEEDS]


@pytest.mark.parametrize("names", [(), ("Dataset001_A", "Dataset002_B")])
def test_a_folder_must_hold_one_data_set(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(LightNetsError, match=rf"must hold one folder Dataset\.\.\., and holds {len(names)}"):
        training.one_dataset(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--raw", "nowhere"], "nowhere must hold one folder Dataset..., and holds 0"),
        (["--preprocessed", "nowhere"], "nowhere must hold one folder Dataset..., and holds 0"),
        (["--minutes", "-1"], "must be positive numbers"),
        (["--out", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", *words])
    assert gpu.main() == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
