"""The documentation's tables are what the scripts make of the recorded results."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pages
import pytest
import tables


@pytest.mark.parametrize(
    ("script", "results"),
    tables.SCRIPTS.items(),
)
def test_a_page_shows_what_is_recorded(
    script: str, results: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: ModuleType = importlib.import_module(script)
    page = Path(shutil.copy(module.PAGE, tmp_path))
    monkeypatch.setattr(module, "PAGE", page)
    before = page.read_text()
    module.write_page(tables.RESULTS / results)
    assert page.read_text() == before


def test_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- table: benchmarks/{}.py -->\nold\n<!-- end of table -->\n"
    page.write_text("above\n" + marks.format("a") + "between\n" + marks.format("b") + "below\n")
    pages.write_table(page, "a.py", pages.markdown(("x", "y"), [{"x": 1}]))
    new = "<!-- table: benchmarks/a.py -->\n\n| x | y |\n|---|---|\n| 1 |  |\n\n<!-- end of table -->\n"
    assert page.read_text() == "above\n" + new + "between\n" + marks.format("b") + "below\n"


@pytest.mark.parametrize("text", ["no mark", "<!-- table: benchmarks/a.py -->\nno end"])
def test_a_page_without_a_place_is_left_alone(text: str, tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="no place for the table"):
        pages.write_table(page, "a.py", ["| x |"])
    assert page.read_text() == text
