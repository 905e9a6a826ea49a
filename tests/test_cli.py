"""The command line: a user's mistake is one line and code 2, anything else keeps its traceback."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from nnunetv2_lightnets import demo
from nnunetv2_lightnets.cli import main
from nnunetv2_lightnets.errors import LightNetsError


def run_into(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """A command that ends with this error."""

    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(demo, "run", fail)
    return main(["demo"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LightNetsError("the thing, its value and the remedy"), "Error: the thing, its value and the remedy\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "Error: /some/file: Permission denied\n"),
        (KeyboardInterrupt(), "Interrupted. Nothing is lost: run the same command again to go on.\n"),
    ],
)
def test_a_mistake_is_one_line(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_into(error, monkeypatch) == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError("words alone"), ZeroDivisionError("why")]
)
def test_what_names_no_file_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)) as caught:
        run_into(error, monkeypatch)
    assert caught.value is error
