"""Imports run one way through the house: from the commands down to the operators, never back."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nnunetv2_lightnets"
MAPPED = {f"{PACKAGE}.trainers": ROOT / "trainers", f"{PACKAGE}.plans": ROOT / "plans"}  # packages at the root

# From low to high. A room may import from itself and from lower ones; rooms of one layer do not know each other.
LAYERS = [
    ["errors"],
    ["files", ""],  # "": the package's own __init__, which imports nothing else before it is asked for
    ["ops"],
    ["networks"],
    ["pretrained"],
    ["nnunet"],
    ["trainers"],
    ["pages"],
    ["comparison", "costs", "plans"],
    ["discovery"],
    ["demo", "doctor"],
    ["cli"],
    ["benchmarks"],
]
RANK = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
FREE_OF_NNUNET = ["errors", "files", "ops", "networks", "pretrained", "pages"]


def files() -> dict[str, Path]:
    """Every source file by the module's name."""
    found = {}
    roots = {PACKAGE: ROOT / PACKAGE, **MAPPED, "benchmarks": ROOT / "benchmarks"}
    for name, folder in roots.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(p for p in parts if p != "__init__")])] = file
    return found


FILES = files()


def room(module: str) -> str:
    """The room of a module: the first part of its name below the package."""
    if module.startswith("benchmarks"):
        return "benchmarks"
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def imported(file: Path) -> Iterator[str]:
    """Names of all modules that a file imports, inside functions too; and strings that name one of ours."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> Iterator[tuple[str, str]]:
    """(importing module, imported module), both ours."""
    for module, file in FILES.items():
        for name in imported(file):
            if name.partition(".")[0] == PACKAGE or f"benchmarks.{name.partition('.')[0]}" in FILES:
                name = name if name.startswith(PACKAGE) else f"benchmarks.{name}"
                while name not in FILES:  # a name inside a module
                    name = name.rpartition(".")[0]
                if name != module:
                    yield module, name


def place(module: str) -> str:
    return str(FILES[module].relative_to(ROOT))


def test_every_package_is_installed() -> None:
    """setuptools takes the packages that pyproject.toml lists, and forgets a new one without a word."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {module for module, file in FILES.items() if file.name == "__init__.py"}
    assert set(listed) == {module for module in packages if room(module) != "benchmarks"}  # which run from the checkout


def test_every_room_has_a_layer() -> None:
    assert {room(module) for module in FILES} == set(RANK)


def test_no_arrow_runs_back() -> None:
    back = [
        f"{place(importing)} imports {place(of)}"
        for importing, of in arrows()
        if room(importing) != room(of)
        and RANK[room(of)] >= RANK[room(importing)]
        # The package's own __init__ hands out two functions of the networks when asked.
        and not (importing == PACKAGE and room(of) == "networks")
    ]
    assert not back, "\n".join(back)


def test_no_two_files_import_each_other() -> None:
    """Nor any longer circle: following arrows from a file never leads back to it."""
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for importing, of in arrows():
        graph[importing].add(of)
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        if module in path:
            pytest.fail(" -> ".join(place(m) for m in [*path[path.index(module) :], module]))
        if module in done:
            return
        for of in sorted(graph[module]):
            # "from package import module" runs the package's __init__, which is the parent, not a neighbour.
            if not module.startswith(f"{of}."):
                follow(of, [*path, module])
        done.add(module)

    graph[PACKAGE] = set()  # lazy, see above
    for module in FILES:
        follow(module, [])


@pytest.mark.parametrize("room_name", FREE_OF_NNUNET)
def test_lower_rooms_do_not_know_nnunet(room_name: str) -> None:
    knows = [
        f"{place(module)} imports {name}"
        for module, file in FILES.items()
        if room(module) == room_name
        for name in imported(file)
        if name.partition(".")[0] in ("nnunetv2", "dynamic_network_architectures", "batchgenerators")
    ]
    assert not knows, "\n".join(knows)
