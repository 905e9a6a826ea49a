"""The pages say what is true: their programs run, their links lead somewhere, their messages and names exist."""

from __future__ import annotations

import ast
import csv
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = ("nnunetv2_lightnets", "trainers", "plans")


def program(page: Path) -> str:
    """All Python blocks of a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_programs_on_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    golden = load_file(ROOT / "tests" / "golden" / "mkunet_T.safetensors")
    authors = {key.removeprefix("state/"): value for key, value in golden.items() if key.startswith("state/")}
    torch.save(authors, "authors_checkpoint.pth")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(program(ROOT / page), page, "exec"), names)
    if page.endswith("python.md"):  # it has learned what it was shown
        found, truth = names["segmentation"], names["labels"]
        assert 2 * (found * truth).sum() / (found.sum() + truth.sum()) > 0.7
        assert len(names["deep"](torch.randn(1, 1, 64, 64))) == 4


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_way_of_a_patch_names_each_file_once() -> None:
    way = (ROOT / "CONTRIBUTING.md").read_text().partition("## One patch")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d+\. `([\w./]+)`", way, flags=re.MULTILINE)
    assert len(steps) > 15 and len(set(steps)) == len(steps)
    for step in steps:
        assert any((root / step).is_file() for root in (ROOT, ROOT / "nnunetv2_lightnets")), step


def texts() -> Iterator[str]:
    """All texts in the package's source; what is filled in is "…"."""
    for folder in SOURCES:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                    yield "".join(parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_on_a_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Messages")[2]
    messages = re.findall(r"^\| `([^`]*)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 10
    said = list(texts())
    for message in messages:
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
        assert any(re.search(pattern, text, flags=re.DOTALL) for text in said), message


def test_the_index_of_the_api_is_complete() -> None:
    rows = re.findall(r"^\| (`.*?) \| `([\w.]+)` \|", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    listed = {(module, name) for names, module in rows for name in re.findall(r"`(\w+)`", names)}
    rooms = ("nnunetv2_lightnets", *(f"nnunetv2_lightnets.{room}" for room in ("networks", "pretrained", "ops")))
    public = {(room, name) for room in rooms for name in importlib.import_module(room).__all__ if name[0] != "_"}
    again = {("nnunetv2_lightnets.networks", name) for name in ("create_network", "list_networks")}
    assert listed == public - again
    variables = set(re.findall(r"`(NNUNET_LIGHTNETS_\w+)", (ROOT / "docs" / "api.md").read_text()))
    assert variables == {name for text in texts() for name in re.findall(r"\bNNUNET_LIGHTNETS_\w+", text)}


def test_the_memory_that_readme_speaks_of_is_the_recorded_one() -> None:
    with (ROOT / "benchmarks" / "results" / "versions.csv").open(encoding="utf-8") as stream:
        rows = {row["network"]: row for row in csv.DictReader(stream)}

    def times_nnunet(network: str) -> float:
        return float(rows[network]["after MB"]) / float(rows[network]["PlainConvUNet MB"])

    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"and {times_nnunet('lightm_unet'):.1f} times the memory" in readme
    assert 0.9 < float(rows["lightm_unet"]["after training step"]) < 1.1  # "up to its time"
    assert all(0.2 < times_nnunet(network) < 0.3 for network in ("ulite", "ultralight_unet"))  # "less than a third"
    with (ROOT / "benchmarks" / "results" / "training_memory.csv").open(encoding="utf-8") as stream:
        large = {
            x["trainer"]: x for x in csv.DictReader(stream) if x["patch"] == "128 x 128 x 128" and x["batch"] == "2"
        }
    lightm, ulite = (
        f"{int(large[name]['measured_MB']) * 2**20 / 1e9:.1f} GB"
        for name in ("nnUNetTrainerLightMUNet", "nnUNetTrainerULite")
    )
    page = " ".join((ROOT / "docs" / "memory.md").read_text().split())
    assert f"takes {lightm} with LightM-UNet on a CPU, and {ulite} with U-Lite" in page
