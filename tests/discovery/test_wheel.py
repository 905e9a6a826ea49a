"""The built wheel in a fresh environment: nnU-Net finds our trainers there, from any folder, without an export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from wheels import clean_environment

pytestmark = pytest.mark.slow

LOOK = """
import json, multiprocessing
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

def where(name):
    trainer = find(name)
    return trainer.__module__, __import__(trainer.__module__, fromlist=["x"]).__file__

if __name__ == "__main__":
    names = json.loads({names!r})
    here = {{name: where(name) for name in names}}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = dict(zip(names, pool.map(where, names)))
    print(json.dumps({{"here": here, "spawned": spawned}}))
"""
NAMES = [*TRAINERS, "nnUNetTrainerLightMUNetT_2epochs_10iters"]


def run(python: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [python, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="environments are laid out differently there")
def test_nnunet_finds_every_trainer_of_the_wheel(fresh_python: Path, tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(LOOK.format(names=json.dumps(NAMES)))
    done = run(fresh_python, str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    site = fresh_python.parent.parent / "lib"
    for who in ("here", "spawned"):
        assert set(found[who]) == set(NAMES)
        for name, (module, file) in found[who].items():
            assert Path(file).is_relative_to(site), (who, name, module, file)


def test_the_wheel_holds_what_the_commands_need(fresh_python: Path, tmp_path: Path) -> None:
    command = fresh_python.parent / "nnUNetv2_lightnets"
    for arguments in (["doctor"], ["networks", "--help"], ["benchmark", "--help"], ["plan", "--help"]):
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    data = (
        "from importlib.resources import files as f; p = f('nnunetv2_lightnets')\n"
        "import nnunetv2_lightnets.plans as plans\n"
        "print(p.joinpath('py.typed').is_file(), p.joinpath('costs/claims.json').is_file(),"
        " any(f(plans).joinpath('reference').iterdir()), any(p.joinpath('costs/templates').iterdir()))"
    )
    assert run(fresh_python, "-c", data, cwd=tmp_path).stdout.split() == ["True"] * 4


def test_switched_off_the_wheel_is_silent(fresh_python: Path, tmp_path: Path) -> None:
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as f;"
        "f('nnUNetTrainerLightMUNet')"
    )
    done = run(fresh_python, "-c", code, cwd=tmp_path, NNUNET_LIGHTNETS_DISABLE="1")
    assert done.returncode != 0 and "Could not find requested nnunet trainer nnUNetTrainerLightMUNet" in done.stderr
