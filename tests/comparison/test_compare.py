"""The comparison as a whole: numbers against numpy and scipy, rules for empty references, the files, the command."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from result_folders import TWO_LABELS, Dataset, balls, environment, folds_of, truth_map, worse
from scipy import stats

from nnunetv2_lightnets import cli
from nnunetv2_lightnets.comparison.analysis import compare
from nnunetv2_lightnets.comparison.comparable import check_comparable
from nnunetv2_lightnets.comparison.figures import forest, worst_units
from nnunetv2_lightnets.comparison.findings import Comparison, Difference, Settings
from nnunetv2_lightnets.comparison.report import _latex, write_report
from nnunetv2_lightnets.comparison.results import read_results, read_subjects
from nnunetv2_lightnets.comparison.wording import lead, notes, p_value, text_summary, title, verdict
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.pages.names import page_names
from nnunetv2_lightnets.pages.text import markdown, signed

FAST = Settings(resamples=999)
COMMAND = (
    "import sys; from nnunetv2_lightnets import cli; "
    "cli.COMMANDS.setdefault('compare', ('nnunetv2_lightnets.comparison.command', '')); sys.exit(cli.main())"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    dataset = balls(tmp_path_factory.mktemp("data with spaces"), 24)
    dataset.trainer("nnUNetTrainer", folds_of(dataset, 0.06, 0, 3), 1000)
    dataset.trainer("nnUNetTrainerLightMUNetS", folds_of(dataset, 0.065, 100, 3), 1000)
    poor = folds_of(dataset, 0.13, 200, 3)
    poor[0]["case_06"][:] = 0  # the network finds nothing
    dataset.trainer("nnUNetTrainerULite_100epochs", poor, 100)
    return dataset


@pytest.fixture(scope="module")
def folders(dataset: Dataset) -> list[str]:
    names = ("nnUNetTrainer", "nnUNetTrainerLightMUNetS", "nnUNetTrainerULite_100epochs")
    results = dataset.root / "results" / "Dataset001_Balls"
    return [str(results / f"{name}__nnUNetPlans__3d_fullres") for name in names]


@pytest.fixture(scope="module")
def comparison(folders: list[str]) -> Comparison:
    results = read_results(folders)
    check_comparable(results, ["Dice"])
    return compare(results, Settings())


@pytest.fixture(scope="module")
def report(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(comparison, folder)
    return folder


def dice(folder: str, label: str | None = None) -> np.ndarray:
    """Dice of every case straight from summary.json, in the order of the cases."""
    scores = {}
    for file in sorted(Path(folder).glob("fold_*/validation/summary.json")):
        for entry in json.loads(file.read_text())["metric_per_case"]:
            by_label = {k: m["Dice"] for k, m in entry["metrics"].items()}
            scores[entry["prediction_file"].split("/")[-1]] = (
                by_label[label] if label else np.mean(list(by_label.values()))
            )
    return np.array([scores[case] for case in sorted(scores)])


# ------------------------------------------------------------------------------------------------------------ numbers


def test_numbers_are_those_of_summary_json_and_scipy(comparison, folders):
    reference, light, poor = (dice(folder) for folder in folders)
    table = comparison.overall()
    assert table.title == "foreground mean"
    assert [s.mean for s in table.scores] == pytest.approx([reference.mean(), light.mean(), poor.mean()])
    assert [s.deviation for s in table.scores] == pytest.approx([x.std(ddof=1) for x in (reference, light, poor)])
    p = [stats.wilcoxon(x - reference).pvalue for x in (light, poor)]
    assert [d.p for d in table.differences] == pytest.approx(p)
    assert [d.p_holm for d in table.differences] == pytest.approx([max(p[0], 2 * min(p)), 2 * min(p)])
    for d, x in zip(table.differences, (light, poor), strict=True):
        assert d.mean == pytest.approx((x - reference).mean())
        assert (d.wins, d.ties, d.losses) == tuple(
            int(n) for n in ((x > reference).sum(), (x == reference).sum(), (x < reference).sum())
        )
        low, high = np.quantile(
            np.random.default_rng(1).choice(x - reference, (20000, 24)).mean(axis=1), [0.025, 0.975]
        )
        assert d.interval.low < low < high < d.interval.high  # widened for 24 cases
        test = stats.ttest_1samp(x - reference, -0.01, alternative="greater")
        assert d.p_non_inferior >= test.pvalue
        assert d.lower <= test.confidence_interval(0.95).low + 1e-9
    ranks = stats.rankdata(-np.stack([reference, light, poor], axis=1), axis=1).mean(axis=0)
    assert [s.rank for s in table.scores] == pytest.approx(ranks)
    assert sum(s.first for s in table.scores) == pytest.approx(1)


def test_the_foreground_mean_is_nnunets(comparison, folders):
    """With every structure in every case, nnU-Net's mean of means is the mean over cases."""
    for score, folder in zip(comparison.overall().scores, folders, strict=True):
        summaries = [json.loads(f.read_text()) for f in Path(folder).glob("fold_*/validation/summary.json")]
        theirs = [s["foreground_mean"]["Dice"] for s in summaries for _ in s["metric_per_case"]]
        assert score.mean == pytest.approx(np.mean(theirs))


def test_metrics_are_compared_one_by_one(folders):
    results = read_results(folders[:2])
    check_comparable(results, ["IoU", "Dice"])
    comparison = compare(results, Settings(metrics=("IoU", "Dice"), resamples=99))
    assert comparison.overall() is comparison.overall("IoU")
    assert comparison.overall("Dice").scores[0].mean == pytest.approx(dice(folders[0]).mean())
    assert comparison.overall("IoU").scores[0].mean < comparison.overall("Dice").scores[0].mean


def test_structures_are_a_family_of_their_own(comparison, folders):
    tables = comparison.by_structure("Dice")
    assert [t.title for t in tables] == ["anterior", "posterior"]
    p = [
        stats.wilcoxon(dice(folder, label) - dice(folders[0], label)).pvalue
        for label in ("1", "2")
        for folder in folders[1:]
    ]
    adjusted = [d.p_holm for t in tables for d in t.differences]
    assert [d.p for t in tables for d in t.differences] == pytest.approx(p)
    order = np.argsort(p)
    expected = np.maximum.accumulate(np.minimum(1, np.array(p)[order] * [4, 3, 2, 1]))
    assert np.array(adjusted)[order] == pytest.approx(expected)


def test_verdicts(comparison):
    light, poor = comparison.overall().differences
    assert light.verdict == "non-inferior, no difference shown"
    assert poor.verdict == "worse"


@pytest.mark.parametrize(
    ("mean", "effect", "p", "p_non_inferior", "expected"),
    [
        (0.02, 0.5, 0.01, 0.001, "better"),
        (0.02, 0.5, 0.01, 0.2, "better, but non-inferiority of the mean is not shown"),
        (-0.02, -0.5, 0.01, 0.9, "worse"),
        (-0.002, -0.5, 0.01, 0.001, "worse, but within the margin"),
        (-0.002, 0.5, 0.01, 0.001, "better in most cases, worse in the mean; within the margin"),
        (-0.02, 0.5, 0.01, 0.6, "better in most cases, worse in the mean; non-inferiority not shown"),
        (0.001, 0.1, 0.4, 0.01, "non-inferior, no difference shown"),
        (-0.001, 0.1, 0.4, 0.2, "inconclusive: neither a difference nor non-inferiority is shown"),
        (-0.001, 0.1, 0.4, None, "inconclusive: neither a difference nor non-inferiority is shown"),
    ],
)
def test_verdict_words(mean, effect, p, p_non_inferior, expected):
    assert verdict(Difference("x", mean, None, p, p, effect, 1, 1, 1, -1, p_non_inferior, p_non_inferior)) == expected


def test_equal_results_do_not_differ(folders):
    results = read_results([f"a={folders[0]}", f"b={folders[1]}"])
    for name, case in results[1].cases.items():
        case.metrics = results[0].cases[name].metrics
    comparison = compare(results, FAST)
    assert "b equals a in every case: are these the same predictions?" in comparison.notes
    d = comparison.overall().differences[0]
    assert (d.mean, d.p, d.effect, d.wins, d.ties, d.losses) == (0, 1, 0, 0, 24, 0)
    assert d.verdict == "non-inferior, no difference shown"
    assert comparison.worst_cases == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_cases(tmp_path, n):
    dataset = balls(tmp_path, n)
    pair = [dataset.trainer(name, folds_of(dataset, share, n_folds=1)) for name, share in (("a", 0.1), ("b", 0.3))]
    comparison = compare(read_results([str(folder) for folder in pair]), FAST)
    d = comparison.overall().differences[0]
    assert (d.interval is None, d.lower is None, d.p) == (n < 3, n < 3, 2 / 2**n)
    write_report(comparison, tmp_path / "out")
    assert Page((tmp_path / "out" / "compare.html").read_text(encoding="utf-8")).tags.count("svg") == 3


def test_largest_losses(comparison, folders):
    reference, poor = dice(folders[0]), dice(folders[2])
    worst = np.argsort(poor - reference)[:3]
    worst_cases = [w for w in comparison.worst_cases if w.result.startswith("nnUNetTrainerULite")]
    assert [w.case for w in worst_cases] == [f"case_{i:02d}" for i in worst]
    assert worst_cases[0].case == "case_06"
    assert worst_cases[0].fold == "0"
    assert worst_cases[0].difference == pytest.approx(poor[6] - reference[6])
    assert worst_cases[0].values["anterior"] == (pytest.approx(dice(folders[0], "1")[6]), 0)


def test_notes_tell_what_to_beware_of(comparison, folders):
    notes = " ".join(comparison.notes)
    assert "Unequal training budgets" in notes
    assert "100 epochs x 250 iterations" in notes
    assert "rarer than about 1 in 8" in notes
    one_fold = compare(read_results(folders[:2], folds=["1"]), FAST).notes
    assert any("One fold" in note for note in one_fold)
    assert any("Only 8 cases" in note for note in one_fold)
    assert not any("budget" in note for note in one_fold)


# ---------------------------------------------------------------------------------------------------- empty references


@pytest.fixture(scope="module")
def partly_empty(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Label 2 is in the reference of cases 2 to 5 only; ``right`` sees that in cases 0 and 1, ``wrong`` in none."""
    truths = {f"case_{i}": truth_map(i) for i in range(6)}
    for case in ("case_0", "case_1"):
        truths[case][truths[case] == 2] = 0
    dataset = Dataset(tmp_path_factory.mktemp("empty"), truths, TWO_LABELS)
    right = {case: worse(truth, 1, 0.1) for case, truth in truths.items()}
    wrong = {case: worse(truth, 2, 0.1) for case, truth in truths.items()}
    for case in ("case_0", "case_1"):
        wrong[case][0, 0, :3] = 2
    return [str(dataset.trainer(name, {0: maps})) for name, maps in (("right", right), ("wrong", wrong))]


def test_dropped_for_all_alike_and_counted(partly_empty):
    comparison = compare(read_results(partly_empty), FAST)
    posterior = comparison.by_structure("Dice")[1]
    assert (posterior.dropped, posterior.units) == (2, [f"case_{i}" for i in range(2, 6)])
    overall = comparison.overall()
    assert overall.dropped == 0
    # In cases 0 and 1 the foreground mean is that of the one structure which is there.
    anterior = comparison.by_structure("Dice")[0]
    assert overall.values[0] == pytest.approx(anterior.values[0])
    assert overall.values[2] == pytest.approx((anterior.values[2] + posterior.values[0]) / 2)
    counted = {f.result: (f.title, f.empty, f.predicted) for f in comparison.false_positives}
    assert counted == {"right": ("posterior", 2, 0), "wrong": ("posterior", 2, 2)}
    assert any("2 cases of posterior" in note for note in comparison.notes)


def test_empty_counts_one_where_asked(partly_empty):
    comparison = compare(read_results(partly_empty), Settings(empty="one", resamples=99))
    posterior = comparison.by_structure("Dice")[1]
    assert posterior.dropped == 0
    assert posterior.values[:2].tolist() == [[1, 0], [1, 0]]
    assert comparison.overall().values[0, 0] == pytest.approx((comparison.by_structure("Dice")[0].values[0, 0] + 1) / 2)


def test_a_structure_in_no_reference_is_left_out(tmp_path):
    truths = {f"case_{i}": np.where(truth_map(i) == 2, 0, truth_map(i)).astype(np.uint8) for i in range(3)}
    dataset = Dataset(tmp_path, truths, TWO_LABELS)
    results = read_results([str(dataset.trainer(name, {0: truths})) for name in ("a", "b")])
    comparison = compare(results, FAST)
    assert [t.title for t in comparison.by_structure("Dice")] == ["anterior"]
    assert any("3 cases of posterior" in note for note in comparison.notes)
    write_report(comparison, tmp_path / "out")
    assert compare(results, Settings(empty="one", resamples=99)).by_structure("Dice")[1].values.tolist() == [[1, 1]] * 3


def test_empty_references_alone_cannot_be_compared(tmp_path):
    truths = {f"case_{i}": np.zeros((4, 6, 5), np.uint8) for i in range(3)}
    dataset = Dataset(tmp_path, truths, TWO_LABELS)
    results = read_results([str(dataset.trainer(name, {0: truths})) for name in ("a", "b")])
    with pytest.raises(LightNetsError, match="every reference segmentation is empty"):
        compare(results, FAST)
    assert compare(results, Settings(empty="one", resamples=99)).overall().scores[0].mean == 1


# ------------------------------------------------------------------------------------------------------------ subjects


def test_scans_of_one_subject_are_averaged_first(folders, tmp_path):
    subjects = {f"case_{i:02d}": f"subject_{i // 2:02d}" for i in range(24)}
    comparison = compare(read_results(folders), FAST, subjects=subjects)
    table = comparison.overall()
    assert (len(table.units), comparison.subjects) == (12, 12)
    pairs = dice(folders[1]).reshape(12, 2).mean(axis=1), dice(folders[0]).reshape(12, 2).mean(axis=1)
    assert table.values[:, 1] == pytest.approx(pairs[0])
    assert table.differences[0].p == pytest.approx(stats.wilcoxon(pairs[0] - pairs[1]).pvalue)
    assert "12 subjects" in text_summary(comparison)

    (tmp_path / "s.json").write_text(json.dumps(subjects))
    (tmp_path / "s.csv").write_text("case,subject\n" + "".join(f"{c},{s}\n" for c, s in subjects.items()))
    assert read_subjects(tmp_path / "s.json") == read_subjects(tmp_path / "s.csv") == subjects
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LightNetsError, match="columns case and subject"):
        read_subjects(tmp_path / "bad.csv")
    (tmp_path / "bad.json").write_text('["case_00"]')
    for name in ("bad.json", "missing.json", "missing.csv"):
        with pytest.raises(LightNetsError, match=f"{name} .*columns case and subject, or a JSON object"):
            read_subjects(tmp_path / name)
    with pytest.raises(LightNetsError, match="no subject for case_23"):
        compare(read_results(folders), FAST, subjects={c: s for c, s in subjects.items() if c != "case_23"})


# -------------------------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a reader sees and what the page would load."""

    VOID = frozenset({"meta", "br", "img", "path", "use", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data") and value]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_loads_nothing(comparison, report):
    text = (report / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith(("data:", "#")) for address in page.loaded)
    assert "script" not in page.tags
    assert not re.search(r"url\((?!#)", text)
    # A difference and a score against every reference and result, and a picture for every loss.
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == len(comparison.worst_cases) == 6
    seen = " ".join(page.text)
    for table in comparison.tables:
        for d in table.differences:
            assert signed(d.mean) in seen
            assert d.verdict in seen
    for words in ("Hesterberg", "Wilcoxon", "24, the same for all results, from 3 folds", "nnunetv2_lightnets"):
        assert words in seen


def test_a_page_of_six_trainers_says_once_what_their_names_share(tmp_path):
    """Recorded results: the plain trainer and five others, all of the same budget."""
    recorded = Path(__file__).parents[2] / "benchmarks" / "results" / "accuracy" / "Dataset504_Hippocampus"
    results = read_results(sorted(str(path) for path in recorded.glob("nnUNetTrainer*")))
    results.sort(key=lambda result: len(result.name))
    names = [result.name for result in results]
    assert len(names) == 6
    write_report(compare(results, FAST, worst=1), tmp_path)
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<h1>5 results against nnUNetTrainer on Dataset504_Hippocampus</h1>" in text
    assert text.count("4 epochs of 250 iterations") == 1
    labels = ["nnUNetTrainer", "SlimUNet", "LightMUNetS", "LightMUNetSNoScan", "ULite", "UltraLightUNet"]
    for label in labels:  # in the tables of three structures, ranks and results, and in a chart of all
        assert sum(piece == label for piece in page.text) >= 6
    assert "…" not in text
    for name in names:  # in the table of results, as name and as folder
        assert text.count(name) == 2
    for file, column in (("compare.csv", "result"), ("compare_cases.csv", None)):
        with open(tmp_path / file, newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert set(names) <= ({row[column] for row in rows} if column else set(rows[0]))
    assert [r["name"] for r in json.loads((tmp_path / "compare.json").read_text())["results"]] == names
    markdown_, tex = ((tmp_path / f"compare.{end}").read_text(encoding="utf-8") for end in ("md", "tex"))
    assert markdown_.startswith("# 5 results against nnUNetTrainer on Dataset504\\_Hippocampus\n")
    for name in names:
        assert f"| {markdown(name)} |" in markdown_
        assert f"{_latex(name)} &" in tex


def test_titles_and_leads(comparison, folders):
    names = page_names(comparison.names)
    assert title(comparison, names) == "LightMUNetS and ULite_100epochs against nnUNetTrainer on Dataset001_Balls"
    assert lead(comparison, names) == ("Dice, foreground mean. 24 cases. Non-inferiority margin 0.01, set beforehand.")
    equal = compare(read_results(folders[:2]), FAST)
    assert "All results: 1000 epochs x 250 iterations, batch 2." in lead(equal, page_names(equal.names))
    assert any(note.startswith("Unequal training budgets: nnUNetTrainer: ") for note in comparison.notes)
    assert any("; ULite_100epochs: 100 epochs" in note for note in notes(comparison, names.label))


def test_far_differences_are_arrows(comparison):
    """Without them, the interval that decides about the margin would be a dot."""
    labels = {name: name for name in comparison.names}
    near = forest([comparison.overall()], labels, 0.05).axes[0]
    assert near.get_xlim()[0] < comparison.overall().differences[1].interval.low
    far = forest([comparison.overall()], labels, 0.001).axes[0]
    assert -0.02 < far.get_xlim()[0] < -0.008
    assert signed(comparison.overall().differences[1].mean, 2) in [text.get_text() for text in far.texts]
    arrows = [(line.get_marker(), *line.get_ydata()) for line in far.lines if line.get_marker() in ("<", ">")]
    beyond = [d.interval.low < -0.008 for d in comparison.overall().differences]
    assert beyond[1]
    assert arrows == [("<", y) for y, is_beyond in enumerate(beyond, start=1) if is_beyond]


def test_worst_cases_of_a_chart(comparison):
    table = comparison.overall()
    losses = table.values[:, 2] - table.values[:, 0]
    assert table.units[worst_units(table, 2)[0]] == "case_06"
    assert worst_units(table, 2) == np.argsort(losses)[:3].tolist()
    assert worst_units(table, 0) == []


def test_a_hostile_name_stays_text(folders, tmp_path):
    results = read_results([f"a={folders[0]}", f"<script>x_1&%|={folders[1]}"])
    write_report(compare(results, FAST, worst=1), tmp_path)
    assert "script" not in Page((tmp_path / "compare.html").read_text(encoding="utf-8")).tags
    tex = (tmp_path / "compare.tex").read_text(encoding="utf-8")
    assert r"$<$script$>$x\_1\&\%|" in tex
    markdown = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert r"\<script\>x\_1&%\|" in markdown


def test_csv_and_json_hold_the_numbers(comparison, report):
    with open(report / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3  # structures with the foreground mean, results
    row = rows[1]
    d = comparison.overall().differences[0]
    assert float(row["difference"]) == d.mean
    assert float(row["p_wilcoxon_holm"]) == d.p_holm
    assert float(row["non_inferiority_lower_bound"]) == d.lower
    assert row["non_inferior"] == "True"
    assert rows[0]["difference"] == ""
    content = json.loads((report / "compare.json").read_text())
    assert content["tables"][0]["results"][1]["difference"] == d.mean
    assert content["settings"]["margin"] == 0.01
    assert content["versions"]["scipy"]
    with open(report / "compare_cases.csv", newline="") as file:
        cases = list(csv.DictReader(file))
    assert len(cases) == 24 * 2
    assert float(cases[0]["nnUNetTrainer"]) == comparison.results[0].cases["case_00"].metrics[(1,)]["Dice"]


def test_markdown_and_latex_are_well_formed(report):
    for line in (report / "compare.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "structure" not in line and line.count("|") > 8:
            assert line.count("|") == 15
    tex = (report / "compare.tex").read_text(encoding="utf-8")
    body = [line for line in tex.splitlines() if not line.startswith("%")]
    assert all(ord(c) < 128 for line in body for c in line)
    rows = [line for line in body if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {7}  # two structures, mean, four tests
    assert len([line for line in body if line.startswith(r"\begin{tabular}{lrrrrrrr}")]) == 1
    assert "\n".join(body).count("{") == "\n".join(body).count("}")


def test_equal_inputs_give_equal_files(comparison, report, tmp_path):
    for file in write_report(comparison, tmp_path):
        assert file.read_bytes() == (report / file.name).read_bytes()


def test_without_predictions_there_are_reasons_instead_of_pictures(folders, tmp_path):
    results = read_results(folders[:2])
    for case in results[1].cases.values():
        case.prediction = tmp_path / "gone.nii.gz"
    write_report(compare(results, FAST, worst=1), tmp_path)
    page = Page((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert "img" not in page.tags
    assert any("gone.nii.gz is gone" in text for text in page.text)


def test_formats():
    assert [signed(x) for x in (0.01, -0.01, 0.0, -0.00001, None, math.nan)] == [
        "+0.0100",
        "−0.0100",
        "0.0000",
        "0.0000",
        "–",
        "–",
    ]
    assert [p_value(x) for x in (0.0004, 0.04, 1, None)] == ["<0.001", "0.040", "1.000", "–"]
    assert _latex("a_b & 5% {x} −1") == r"a\_b \& 5\% \{x\} $-$1"
    assert markdown("a_b|c") == r"a\_b\|c"


# ------------------------------------------------------------------------------------------------------------- command


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "compare", *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_writes_the_report(folders, tmp_path):
    done = command(*folders[:2], "-o", "out", "--margin", "0.02", "--worst", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nnUNetTrainerLightMUNetS" in done.stdout
    assert "non-inferior" in done.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"compare.{e}" for e in ("html", "md", "tex", "csv", "json")} | {"compare_cases.csv"}
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]["margin"] == 0.02


def test_the_reference_can_be_chosen_and_nsd_added(folders, tmp_path, monkeypatch):
    pytest.importorskip("monai")
    monkeypatch.setitem(cli.COMMANDS, "compare", ("nnunetv2_lightnets.comparison.command", ""))
    monkeypatch.chdir(tmp_path)
    arguments = [f"a={folders[0]}", f"b={folders[1]}", "--reference", "b", "--nsd", "1.5", "-f", "0", "-np", "1"]
    assert cli.main(["compare", *arguments, "--worst", "0"]) == 0
    content = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert content["reference"] == "b"
    assert {table["metric"] for table in content["tables"]} == {"Dice", "NSD"}
    assert content["settings"]["nsd_tolerance"] == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}"], "compare needs two or more results, got 1"),
        (["{0}", "{1}", "--margin", "0"], "--margin 0 must be between 0 and 1"),
        (["{0}", "{1}", "--reference", "x"], "--reference x is none of the results; choose from nnUNetTrainer, "),
        (["{0}", "{1}", "--metrics", "Jaccard"], "nnUNetTrainer has no Jaccard; it has Dice"),
        (["{0}", "{1}/fold_0"], "lacks 16 of the 24 cases of nnUNetTrainer: case_01, case_02, case_04"),
        (["{0}", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_take_one_line_and_exit_code_2(folders, tmp_path, arguments, message):
    done = command(*(a.format(*folders) for a in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "compare").exists()
