"""What pages share: colours that tell results apart, files that are whole, rows as CSV."""

from __future__ import annotations

import pytest

from nnunetv2_lightnets.pages.figures import series
from nnunetv2_lightnets.pages.render import write_files
from nnunetv2_lightnets.pages.text import csv_text


def test_results_differ_in_colour_or_marker():
    assert len({series(j) for j in range(36)}) == 36
    assert series(0) != series(6)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert write_files(folder, {"a.html": "one\n", "b.csv": "2\n"}) == [folder / "a.html", folder / "b.csv"]
    with pytest.raises(UnicodeEncodeError):
        write_files(folder, {"a.html": "half\ud800"})
    assert (folder / "a.html").read_bytes() == b"one\n"
    assert sorted(path.name for path in folder.iterdir()) == ["a.html", "b.csv"]


def test_rows_as_csv():
    rows = [{"a": 1, "b": None}, {"a": "x,y", "b": 0.5}]
    assert csv_text(rows) == 'a,b\n1,\n"x,y",0.5\n'
    assert csv_text([], ["a", "b"]) == "a,b\n"
