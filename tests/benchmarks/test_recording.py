"""What all scripts share: rows are kept as they come, tables go to their place on a page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import recording


def test_rows_are_added_and_replaced_by_their_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    recording.Record(file, "network", "patch").put(
        {"network": "a", "patch": 8, "ms": 1.5}, {"network": "b", "patch": 8}
    )
    record = recording.Record(file, "network", "patch")
    assert ("a", 8) in record and ("a", 9) not in record
    record.put({"network": "a", "patch": 8, "ms": 2, "about": "x, y"}, {"network": "c", "patch": 9, "ms": None})
    assert file.read_text() == 'network,patch,ms,about\na,8,2,"x, y"\nb,8,,\nc,9,,\n'
    assert recording.read_rows(file) == [{"about": "", "ms": ""} | row for row in recording.Record(file).rows]


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert recording.Record(tmp_path / "rows.csv", "x").rows == []


def test_runs_take_turns_and_the_first_turn_is_not_counted() -> None:
    calls: list[str] = []
    seconds = recording.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert recording.median_ratio([2, 6, 9], [1, 2, 9]) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0487, "0.0487"),
        (0.886, "0.886"),
        (5.0158, "5.02"),
        (55.36, "55.4"),
        (477.3, "477"),
        (1000.75, "1001"),
        (0, "0"),
    ],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert recording.short(value) == text
    assert math.isclose(float(text), value, rel_tol=0.005)


def test_a_table_for_a_text_is_short() -> None:
    rows = [{"x": i} for i in range(recording.MOST_ROWS)]
    assert len(recording.table(rows)) == recording.MOST_ROWS + 2
    with pytest.raises(ValueError, match="a table of 8 rows"):
        recording.table([*rows, {"x": 8}])


@pytest.mark.parametrize(("page", "path"), [("README.md", "benchmarks"), ("docs/planning.md", "../benchmarks")])
def test_a_link_leads_from_the_page_to_the_file(page: str, path: str) -> None:
    line = recording.link(page, recording.RESULTS / "plans.csv")
    assert line == f"All rows: [`plans.csv`]({path}/results/plans.csv)."


def test_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- table: benchmarks/{}.py -->\nold\n<!-- end of table -->\n"
    page.write_text("above\n" + marks.format("a") + "between\n" + marks.format("b") + "below\n")
    recording.write_tables("a", {"page.md": recording.markdown(("x", "y"), [{"x": 1}])}, tmp_path)
    new = "<!-- table: benchmarks/a.py -->\n\n| x | y |\n|---|---|\n| 1 |  |\n\n<!-- end of table -->\n"
    assert page.read_text() == "above\n" + new + "between\n" + marks.format("b") + "below\n"


@pytest.mark.parametrize("text", ["no mark", "<!-- table: benchmarks/a.py -->\nno end"])
def test_a_page_without_a_place_is_left_alone(text: str, tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="no place for the table"):
        recording.write_tables("a", {"page.md": ["| x |"]}, tmp_path)
    assert page.read_text() == text
