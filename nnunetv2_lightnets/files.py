"""Files: written whole or not at all, and read with an error that says what to do."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nnunetv2_lightnets.errors import LightNetsError

CACHE_VARIABLE = "NNUNET_LIGHTNETS_CACHE"


def cache_folder() -> Path:
    """``$NNUNET_LIGHTNETS_CACHE``, or the user's cache folder of this system. It may not exist yet."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    import pooch  # here, as scans in a Python without it must still run

    return Path(pooch.os_cache("nnunetv2_lightnets"))


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the file at ``path`` when the block ends without an error.

    An interruption, at any moment, leaves what was there before. A kill leaves ``path.partial`` behind, which the next
    write replaces.
    """
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def write_atomically(path: str | os.PathLike[str], content: str) -> None:
    """Write text (UTF-8) whole or not at all, see :func:`atomic_file`."""
    with atomic_file(path) as stream:
        stream.write(content.encode("utf-8"))


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LightNetsError: there is none; the message ends with ``remedy``.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except FileNotFoundError as error:
        raise LightNetsError(f"{file} does not exist; {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        at = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LightNetsError(f"{file} is truncated or not JSON{at}; {remedy}") from error
    if not isinstance(content, dict):
        raise LightNetsError(f"{file} holds a {type(content).__name__}, not an object; {remedy}")
    return content


def last_line(text: object) -> str:
    """The last line that says something, of a log or of an error: libraries write pages before it."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    if lines:
        return lines[-1]
    return type(text).__name__ if isinstance(text, Exception) else "no message"


def is_damaged(error: BaseException) -> bool:
    """Whether an error of ``torch.load`` says that the file is truncated, damaged, or no checkpoint at all.

    Other errors, such as too little memory, say nothing about the file.
    """
    text = str(error)
    return isinstance(error, EOFError | pickle.UnpicklingError) or (
        isinstance(error, RuntimeError) and ("PytorchStreamReader" in text or "corrupt" in text)
    )
