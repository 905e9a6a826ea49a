"""The benchmark of costs: settings, measuring in a process of its own, resuming, and the report."""

from __future__ import annotations

import argparse
import csv
import json
import pickle
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_lightnets.costs import command, figures, networks_table, worker
from nnunetv2_lightnets.costs.memory import Memory
from nnunetv2_lightnets.costs.report import megabytes, read_scores, score_of, seconds, spread
from nnunetv2_lightnets.costs.worker import Job, measured_step
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet import malloc
from nnunetv2_lightnets.nnunet.plans import dataset_setting, patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch

PATCH = ["--patch", "32", "32", "--seconds", "0.05", "--threads", "1"]


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(given)


# ----------------------------------------------------------------------------------------------------------- settings


def test_a_free_patch_is_planned_as_nnunet_plans():
    setting = patch_setting([128, 128, 128], 1, 3)
    planned = setting.plans["configurations"][setting.configuration]["architecture"]["arch_kwargs"]
    assert planned["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert planned["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 5
    assert (setting.patch, setting.batch_size, setting.volume) == ((128, 128, 128), 2, (256, 256, 256))
    assert setting.title == "patch 128 x 128 x 128, 1 channel, 3 classes"
    # nnU-Net's network needs sizes that its strides divide: rounded up, as nnU-Net does.
    assert patch_setting([20, 50, 64], 1, 2).patch == (20, 56, 64)
    flat = patch_setting([512, 512], 3, 2)
    assert flat.volume == (1, 1024, 1024)
    assert flat.plans["configurations"]["free"]["architecture"]["arch_kwargs"]["features_per_stage"][-1] == 512
    assert patch_setting([64, 64], 1, 2, volume=[30, 100, 90]).volume == (30, 100, 90)


@pytest.fixture
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Dataset007_Seven"
    folder.mkdir()
    setting = patch_setting([32, 32, 32], 2, 3)
    full = setting.plans["configurations"]["free"]
    plans = setting.plans | {
        "original_median_shape_after_transp": [30, 60, 50],
        "configurations": {"3d_fullres": full, "3d_big": {"inherits_from": "3d_fullres", "batch_size": 5},
                           "2d": full | {"patch_size": [32, 32], "median_image_size_in_voxels": [60.0, 50.0]}},
    }  # fmt: skip
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(setting.dataset_json))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


def test_a_data_sets_plans(preprocessed):
    setting = dataset_setting("7", "3d_big")
    assert (setting.patch, setting.batch_size, setting.volume) == ((32, 32, 32), 5, (64, 64, 64))
    assert setting.title == "Dataset007_Seven, 3d_big, nnUNetPlans"
    assert dataset_setting("Dataset007_Seven", "2d").volume == (30, 60, 50)


def test_mistakes_in_data_sets(preprocessed, monkeypatch):
    with pytest.raises(LightNetsError, match="no data set 8"):
        dataset_setting("8", "2d")
    with pytest.raises(LightNetsError, match="-c 3d_lowres is not in nnUNetPlans of Dataset007_Seven, which have: 3d"):
        dataset_setting("7", "3d_lowres")
    with pytest.raises(LightNetsError, match=r"Other\.json does not exist; plan it"):
        dataset_setting("7", "2d", "Other")
    (preprocessed / "nnUNetPlans.json").write_text("{")
    with pytest.raises(LightNetsError, match="truncated or not JSON at line 1"):
        dataset_setting("7", "2d")
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(LightNetsError, match="nnUNet_preprocessed is not set"):
        dataset_setting("7", "2d")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "either a data set"),
        (["-d", "4", "-c", "2d", "--patch", "64", "64"], "either a data set"),
        (["-d", "4"], "-d 4 needs a configuration"),
        (["--patch", "64"], "2 or 3 numbers"),
        (["--patch", "64", "4"], "at least 8"),
        (["--patch", "64", "64", "--classes", "0"], "--classes must be at least 1"),
        (["--patch", "64", "64", "--seconds", "0"], "--seconds must be above 0"),
        (["--patch", "64", "64", "-tr", "nnUNetTrainerNope"], "no trainer nnUNetTrainerNope"),
    ],
)
def test_mistakes_in_arguments(given, message, tmp_path):
    with pytest.raises(LightNetsError, match=message):
        command.run(arguments(*given, "-o", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.slow
def test_a_network_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    """The whole command on a small patch; then again, which measures nothing."""
    given = [*PATCH, "--batch-size", "2", "-device", "cpu", "-tr", "nnUNetTrainerLightMUNetT", "-o", str(tmp_path)]
    assert command.run(arguments(*given)) == 0
    benchmark = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = benchmark["rows"]
    assert "error" not in row, row
    from nnunetv2_lightnets import create_network
    from nnunetv2_lightnets.networks.counting import count_macs, count_parameters

    network = create_network("lightm_unet", spatial_dims=2, input_channels=1, num_classes=2, width=8)
    assert row["parameters"] == count_parameters(network)
    assert row["macs"] == count_macs(network, 1, [32, 32])
    for what in ("inference", "training", "volume"):
        assert row[what]["runs"] >= 1
        assert 0 < row[what]["quartiles"][0] <= row[what]["median"] <= row[what]["quartiles"][1]
        assert row[what]["memory"] > 0
    assert row["volume"]["voxels"] == 64 * 64
    assert row["training"]["batch_size"] == 2
    assert benchmark["machine"]["device"] == "cpu"
    assert benchmark["machine"]["threads"] == 1
    assert {p.name for p in tmp_path.iterdir()} >= {"benchmark.html", "benchmark.md", "benchmark.csv", "logs"}
    assert "nnUNetTrainerLightMUNetT" in capsys.readouterr().out
    start = time.perf_counter()
    assert command.run(arguments(*given)) == 0
    assert time.perf_counter() - start < 5
    assert json.loads((tmp_path / "benchmark.json").read_text()) == benchmark


def test_claims_are_set_beside_our_own_counts():
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    claims = json.loads(command.CLAIMS.read_text())
    for claim in claims:
        assert claim["quantity"] in ("parameters", "MACs")
        assert claim["source"]
        assert claim["why"]
        if claim["counter_gives"] is not None:  # what the paper printed is what its counter gives, rounded
            assert claim["counter_gives"] == pytest.approx(claim["claimed"], rel=0.02)
    nnunet = [c for c in claims if c["trainer"] == "nnUNetTrainer" and c["patch"] == [128, 128, 128]]
    ours = {c["quantity"]: worker.check_claim(nnUNetTrainer, c)["ours"] for c in nnunet}
    assert ours == {"parameters": 31_196_399, "MACs": 477_298_688_000}


def test_jobs_survive_the_way_into_another_process():
    job = Job("nnUNetTrainer", patch_setting([32, 32], 1, 2), 2, (1, 64, 64), "cpu", 1, 0.5, False, ({"a": 1},))
    assert pickle.loads(pickle.dumps(job)) == job


def test_timing_warms_up_first():
    calls: list[float] = []

    def slow_at_first() -> None:
        time.sleep(0.05 if not calls else 0.001)
        calls.append(0)

    memory = Memory(torch.device("cpu"))
    timing = measured_step(slow_at_first, 0.1, memory)
    assert timing["median"] < 0.02
    assert len(calls) == timing["runs"] + 2 <= worker._MOST + 2
    calls.clear()
    assert measured_step(lambda: time.sleep(0.03), 0.01, memory)["runs"] == 3
    assert measured_step(lambda: time.sleep(0.03), 0.001, memory)["runs"] == 1


def test_memory_is_that_of_steps_after_which_nothing_is_kept(monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr(malloc, "_can_keep", lambda: True)
    monkeypatch.setattr(malloc, "_keep", lambda: True)
    monkeypatch.setattr(malloc, "_left", lambda: float("inf"))
    monkeypatch.setattr(malloc._Process, "keeps", False)
    measured_step(lambda: kept.append(malloc.reuse_freed_memory()), 1e-9, Memory(torch.device("cpu")), alone=2)
    assert kept == [False] * 3, "two to see the memory, and one that shows how much may be kept"
    measured_step(lambda: kept.append(malloc.reuse_freed_memory()), 0.001, Memory(torch.device("cpu")))
    assert kept[3:6] == [False, False, True] and all(kept[6:])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks cannot be reset here")
def test_memory_is_what_was_needed_at_most():
    memory = Memory(torch.device("cpu"))
    memory.start()
    block = torch.ones(50_000_000)  # 200 MB
    del block
    assert 190e6 < memory.peak() < 260e6
    memory.start()
    assert memory.peak() < 60e6


def test_a_peak_that_cannot_be_restarted_is_told(monkeypatch):
    """In containers, /proc may be read-only."""
    write_text = Path.write_text

    def read_only(file: Path, *text: str, **how: Any) -> int:
        if file.name == "clear_refs":
            raise PermissionError(13, "Permission denied", str(file))
        return write_text(file, *text, **how)

    memory = Memory(torch.device("cpu"))
    memory.start()
    assert set(memory.measured()) == {"memory"} or not Path("/proc/self/clear_refs").exists()
    monkeypatch.setattr(Path, "write_text", read_only)
    block = torch.ones(50_000_000)  # 200 MB, of an earlier measurement
    del block
    memory.start()
    measured = memory.measured()
    assert measured.pop("memory_since") == "the process began"
    assert measured == {"memory": memory.peak()}
    assert memory.peak() > 190e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's memory cannot be given back")
def test_memory_that_was_freed_before_is_counted_when_it_is_used_again():
    def small_tensors() -> list[torch.Tensor]:  # the system's allocator keeps what is freed of such sizes
        return [torch.ones(25_000) for _ in range(2000)]  # 200 MB

    blocks, behind_them = small_tensors(), torch.ones(1)
    del blocks
    memory = Memory(torch.device("cpu"))
    memory.start()
    small_tensors()
    del behind_them
    assert memory.peak() > 190e6


def test_regions_and_deep_supervision_have_their_targets():
    """A batch as nnU-Net's loader makes it: a target for each resolution, a channel for each region."""

    class Network(torch.nn.Module):
        def forward(self, x):
            return [x[:, :1], torch.nn.functional.avg_pool2d(x[:, :1], 2)]

    manager = argparse.Namespace(has_regions=True, num_segmentation_heads=3)
    trainer = argparse.Namespace(
        network=Network(), device=torch.device("cpu"), label_manager=manager, num_input_channels=2
    )
    batch = make_batch(trainer, (16, 16), 4)
    assert batch["data"].shape == (4, 2, 16, 16)
    assert [tuple(t.shape) for t in batch["target"]] == [(4, 3, 16, 16), (4, 3, 8, 8)]
    assert batch["target"][0].dtype == torch.bool
    manager.has_regions = False
    target = make_batch(trainer, (16, 16), 4)["target"][0]
    assert target.shape == (4, 1, 16, 16)
    assert set(target.unique().tolist()) == {0, 1, 2}


def test_a_batch_for_a_compiled_network_compiles_nothing():
    """It would be compiled for one patch, and then for any number of patches."""
    network = torch.nn.Conv2d(2, 3, 1)
    compiled = torch.compile(network, backend=lambda *_: pytest.fail("it was compiled"))
    manager = argparse.Namespace(has_regions=False, num_segmentation_heads=3)
    trainer = argparse.Namespace(
        network=compiled, device=torch.device("cpu"), label_manager=manager, num_input_channels=2
    )
    assert make_batch(trainer, (16, 16), 4)["target"].shape == (4, 1, 16, 16)


# ----------------------------------------------------------------------------------------------------------- resuming


def row(seconds_: float = 0.1, **more: Any) -> dict[str, Any]:
    timing = {"median": seconds_, "quartiles": [seconds_, seconds_ * 1.1], "runs": 5, "memory": 5e7}
    return {
        "inference": timing, "training": timing | {"batch_size": 2}, "volume": timing | {"voxels": 4096},
        "network": "Net", "parameters": 380_000, "macs": 3e8, "compiled": False, "deep_supervision": False,
        "claims": [], "machine": {"processor": "P", "device": "cpu", "threads": 1, "memory": 8e9}, **more,
    }  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainers measured, in place of real processes; the one called T fails, U asks to be interrupted."""
    names: list[str] = []

    def measure_in_process(job: Job, log: Path) -> dict[str, Any]:
        names.append(job.trainer.removeprefix("nnUNetTrainer"))
        if names[-1] == "LightMUNetT":
            return {"error": "out of memory"}
        if names[-1] == "LightMUNet" and len(names) == 2:
            raise KeyboardInterrupt
        return row(0.1 * len(names), parameters=1000 * len(names))

    monkeypatch.setattr(command, "measure_in_process", measure_in_process)
    return names


TRAINERS = ["-tr", *(f"nnUNetTrainer{n}" for n in ("LightMUNetS", "LightMUNet", "LightMUNetT"))]


def test_an_interruption_loses_no_row(measured, tmp_path, capsys):
    given = [*PATCH, *TRAINERS, "-o", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments(*given))
    assert [r["name"] for r in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == TRAINERS[1:2]
    assert command.run(arguments(*given)) == 0
    assert measured == ["LightMUNetS", "LightMUNet", "LightMUNet", "LightMUNetT"]
    assert "nnUNetTrainerLightMUNetT  failed: out of memory" in capsys.readouterr().out
    # What failed is measured again only where asked for.
    command.run(arguments(*given))
    assert len(measured) == 4
    command.run(arguments(*given, "--retry"))
    assert measured[4:] == ["LightMUNetT"]


def test_other_settings_and_machines_are_not_mixed(measured, tmp_path, monkeypatch):
    command.run(arguments(*PATCH, *TRAINERS[:2], "-o", str(tmp_path)))
    with pytest.raises(LightNetsError, match=r"a benchmark of other settings \(batch size 2\)"):
        command.run(arguments(*PATCH, *TRAINERS[:2], "--batch-size", "3", "-o", str(tmp_path)))
    monkeypatch.setattr(command, "measure_in_process", lambda job, log: row(machine={"processor": "Q"}))
    with pytest.raises(LightNetsError, match="measured with processor P"):
        command.run(arguments(*PATCH, *TRAINERS, "-o", str(tmp_path)))
    (tmp_path / "benchmark.json").write_text("[]")
    with pytest.raises(LightNetsError, match="is no benchmark"):
        command.run(arguments(*PATCH, *TRAINERS, "-o", str(tmp_path)))


def test_further_plans_are_for_the_baseline_alone(preprocessed, measured, tmp_path):
    (preprocessed / "ResEnc.json").write_text((preprocessed / "nnUNetPlans.json").read_text())
    given = ["-d", "7", "-c", "3d_fullres", "-p", "nnUNetPlans", "ResEnc", "-tr", "nnUNetTrainer", *TRAINERS[1:2]]
    command.run(arguments(*given, "-o", str(tmp_path / "out")))
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["nnUNetTrainer", TRAINERS[1], "nnUNetTrainer__ResEnc"]


def test_default_trainers_fit_the_dimension():
    assert "nnUNetTrainerSwinUMamba" in command.fitting_trainers(2)
    assert "nnUNetTrainerSwinUMamba" not in command.fitting_trainers(3)
    assert "nnUNetTrainerLightMUNet" in command.fitting_trainers(3)


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    job = Job("nnUNetTrainer", patch_setting([32, 32], 1, 2), 2, None, "cpu", 1, 0.5, False)

    def python(code: str) -> None:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        (tmp_path / "python").write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "python").chmod(0o755)

    python("echo Traceback; echo 'RuntimeError: too large'; exit 1")
    assert command.measure_in_process(job, tmp_path / "logs" / "x.log") == {"error": "RuntimeError: too large"}
    for number, reason in (
        (9, "ended by SIGKILL, for lack of memory perhaps"),
        (15, "ended by SIGTERM"),
        (40, "ended by signal 40"),  # one of those that have no name
    ):
        python(f"kill -{number} $$")
        assert command.measure_in_process(job, tmp_path / "x.log") == {"error": reason}
    python("exit 0")
    assert command.measure_in_process(job, tmp_path / "x.log") == {"error": "the process ended without a result"}


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_holds_every_row_and_claim(measured, tmp_path, monkeypatch):
    claim = json.loads(command.CLAIMS.read_text())[1] | {"ours": 177_190_000_000}
    monkeypatch.setattr(
        command,
        "measure_in_process",
        lambda job, log: row(parameters=len(job.trainer) * 1000, claims=[claim] if job.trainer == TRAINERS[2] else []),
    )
    scores = {
        "results": [{"name": "a", "folder": f"/r/{TRAINERS[1]}_100epochs__nnUNetPlans__2d"}],
        "tables": [{"results": [{"result": "a", "mean": 0.8}, {"result": TRAINERS[2], "mean": 0.9}]}],
    }
    (tmp_path / "compare.json").write_text(json.dumps(scores))
    command.run(arguments(*PATCH, *TRAINERS, "-o", str(tmp_path), "--dice", str(tmp_path / "compare.json")))
    page = (tmp_path / "benchmark.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    assert "http://" not in page.replace("http://www.w3.org/", "")
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    for text in (*TRAINERS[1:], "177.19 G", "457.62 GFLOPs", "thop", "8 GB"):
        assert text in page
    with open(tmp_path / "benchmark.csv", newline="") as file:
        rows = {r["name"]: r for r in csv.DictReader(file)}
    assert float(rows[TRAINERS[1]]["score"]) == 0.8
    assert float(rows[TRAINERS[2]]["score"]) == 0.9
    assert rows[TRAINERS[3]]["score"] == ""
    assert float(rows[TRAINERS[1]]["voxels_per_second"]) == pytest.approx(40960)
    markdown = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {9, 8}
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(LightNetsError, match=r"is no compare\.json"):
        read_scores(tmp_path / "compare.json")


def test_the_page_names_networks_by_what_tells_them_apart(preprocessed, measured, tmp_path):
    (preprocessed / "nnUNetResEncUNetMPlans.json").write_text((preprocessed / "nnUNetPlans.json").read_text())
    plans = ["-p", "nnUNetPlans", "nnUNetResEncUNetMPlans"]
    trainers = ["nnUNetTrainer", "nnUNetTrainerULite", "nnUNetTrainerLightMUNetT"]
    command.run(arguments("-d", "7", "-c", "3d_fullres", *plans, "-tr", *trainers, "-o", str(tmp_path / "out")))
    page = (tmp_path / "out" / "benchmark.html").read_text(encoding="utf-8")
    for label in ("nnUNetTrainer", "ULite", "LightMUNetT", "nnUNetTrainer ResEncUNetM"):
        assert page.count(f'data-label="Network of">{label}</td>') == 2  # among the figures, or failed; among trainers
    for name in (*trainers[1:], "nnUNetTrainer__nnUNetResEncUNetMPlans"):
        assert page.count(name) == 1
    with open(tmp_path / "out" / "benchmark.csv", newline="") as file:
        names = [r["name"] for r in csv.DictReader(file)]
    assert names == [*trainers, "nnUNetTrainer__nnUNetResEncUNetMPlans"]


def test_the_page_says_where_peaks_could_not_be_restarted(tmp_path, monkeypatch):
    timing = {"median": 0.1, "quartiles": [0.1, 0.1], "runs": 3, "memory": 5e7, "memory_since": "the process began"}
    for more, times in (({}, 0), ({"training": timing | {"batch_size": 2}}, 1)):
        monkeypatch.setattr(command, "measure_in_process", lambda job, log, more=more: row(**more))
        out = tmp_path / str(times)
        command.run(arguments(*PATCH, *TRAINERS[:2], "-o", str(out)))
        for file in ("benchmark.html", "benchmark.md"):
            assert (out / file).read_text(encoding="utf-8").count("since the process began") == times


def test_scores_of_budgeted_trainings_count():
    scores = {"nnUNetTrainerA_100epochs_10iters": 0.7, "nnUNetTrainerAB": 0.6}
    assert score_of({"name": "nnUNetTrainerA"}, scores) == 0.7
    assert score_of({"name": "nnUNetTrainerAB"}, scores) == 0.6
    assert score_of({"name": "nnUNetTrainerC"}, scores) is None


def test_formats():
    assert [s.replace("\N{NO-BREAK SPACE}", " ") for s in (seconds(1.234), seconds(0.0456), seconds(None))] == [
        "1.23 s", "45.6 ms", "–",
    ]  # fmt: skip
    timing = {"quartiles": [0.0441, 0.047], "runs": 20}
    assert spread(timing).replace("\N{NO-BREAK SPACE}", " ") == "44.1 to 47.0 ms, 20 runs"
    assert spread({"runs": 1}) == "1 run"
    assert megabytes(1_234_567_890).replace("\N{NO-BREAK SPACE}", " ") == "1,235 MB"


def test_the_front_is_what_no_other_beats_in_both():
    figure = figures.pareto(["a", "b", "c", "d"], [1, 2, 3, 4], [5, 3, 4, 1], "x", "y", more_is_better=False)
    front = figure.axes[0].lines[0]
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(1, 5), (2, 3), (4, 1)]
    figure = figures.pareto(["a", "b", "c"], [1, 2, 3], [0.8, 0.7, 0.9], "x", "y", more_is_better=True)
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 3]


def test_labels_do_not_cover_each_other():
    heights = figures._spread_out([0.5, 0.5, 0.51, 0.99, 1.0, 0.1], 0.05)
    assert sorted(heights)[0] == pytest.approx(0.1)
    gaps = [b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)]
    assert min(gaps) >= 0.05 - 1e-9
    assert max(heights) <= 1 + 1e-9


def test_the_table_of_networks_counts_what_each_trainer_builds_from_the_plans(monkeypatch):
    names = [f"nnUNetTrainer{name}" for name in ("ULite", "SlimUNetULite", "UMambaBot")]
    monkeypatch.setattr(networks_table, "fitting_trainers", lambda dims: names)
    rows = {line.split()[0]: line.split() for line in list(networks_table.table([40, 56], 1, 3))[2:]}
    assert list(rows) == names
    assert rows["nnUNetTrainerULite"][1:-1] == ["ulite", "2D,", "3D", "0.877"]
    assert rows["nnUNetTrainerUMambaBot"][1:-1] == ["umamba_bot", "2D,", "3D", "2.815"]  # 4 stages, as planned
    assert rows["nnUNetTrainerSlimUNetULite"][1] == "PlainConvUNet"
    slim, light = (float(rows[name][-1]) for name in names[1::-1])
    assert slim == pytest.approx(light, abs=0.01)


def test_the_table_of_networks_counts_the_memory_of_a_training_step(monkeypatch):
    from nnunetv2_lightnets.nnunet.memory import training_memory
    from nnunetv2_lightnets.trainers import find_trainer

    monkeypatch.setattr(networks_table, "fitting_trainers", lambda dims: ["nnUNetTrainerULite"])
    _, head, line = networks_table.table([128, 128], 1, 3, memory=True)
    assert head.split()[-1] == "GB"
    bytes_ = training_memory(find_trainer("nnUNetTrainerULite"), patch_setting([128, 128], 1, 3), 2).total
    assert line.split()[-1] == f"{bytes_ / 1e9:.2f}"
    assert 0.02 < bytes_ / 1e9 < 0.5
    assert len(head) == len(line)
