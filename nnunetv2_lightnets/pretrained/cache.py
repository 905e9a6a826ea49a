"""Where pretrained weights are kept, and the record of what was first put there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import pooch

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import cache_folder, write_atomically

# VMamba-Tiny, trained on ImageNet-1K without EMA (Liu et al., VMamba, arXiv:2401.10166v1; MIT licence). The same
# file under two releases, as the project moved it; "%23" is the "#" of the release's name.
VMAMBA_CHECKPOINT = "vssmtiny_dp01_ckpt_epoch_292.pth"
VMAMBA_URLS = (
    f"https://github.com/MzeroMiko/VMamba/releases/download/%2320240218/{VMAMBA_CHECKPOINT}",
    f"https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/{VMAMBA_CHECKPOINT}",
)
VMAMBA_FILE = "vmamba_tiny_v0.safetensors"
RECORD_FILE = "record.json"


def vmamba_path() -> Path:
    """Where ``nnUNetv2_lightnets weights`` puts VMamba-Tiny's weights, and pretrained trainers look for them."""
    return cache_folder() / VMAMBA_FILE


def two_ways_out() -> str:
    """How to get VMamba-Tiny's weights, as the end of an error message."""
    return (
        "run `nnUNetv2_lightnets weights`, or where there is no internet download "
        f"{VMAMBA_URLS[0]} elsewhere and run `nnUNetv2_lightnets weights --from FILE`"
    )


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was first seen: later it must be the same."""

    size: int  # bytes
    sha256: str
    source: str  # address or file it came from
    recorded: str  # UTC, ISO 8601

    @classmethod
    def of(cls, path: Path, source: str) -> FileRecord:
        """Size and SHA-256 of the file at ``path``, recorded now."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(path.stat().st_size, pooch.file_hash(path), source, now)


def read_records(folder: Path) -> dict[str, FileRecord]:
    """The records of ``folder`` by file name; empty where none was made.

    Raises:
        LightNetsError: the record file is damaged.
    """
    path = folder / RECORD_FILE
    try:
        return {name: FileRecord(**fields) for name, fields in json.loads(path.read_text("utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise LightNetsError(f"the record of downloaded weights {path} is damaged ({error}); delete it") from error


def write_record(folder: Path, name: str, record: FileRecord) -> None:
    """Add the record of the file ``name`` in ``folder``; the file on disk is always whole."""
    records = {key: asdict(value) for key, value in (read_records(folder) | {name: record}).items()}
    write_atomically(folder / RECORD_FILE, json.dumps(records, indent=2) + "\n")


def check_file(path: Path, name: str | None = None, folder: Path | None = None) -> str:
    """SHA-256 of the file at ``path``, which must be as recorded for ``name`` in ``folder``, where it is recorded.

    Raises:
        LightNetsError: the file is shorter than recorded, or another one.
    """
    folder = folder or path.parent
    record = read_records(folder).get(name or path.name)
    size = path.stat().st_size
    if record and size < record.size:
        raise LightNetsError(
            f"{path} is truncated: {size:,} of {record.size:,} bytes; delete it, then {two_ways_out()}"
        )
    sha256: str = pooch.file_hash(path)
    if record and sha256 != record.sha256:
        raise LightNetsError(
            f"{path} is not the file first used: its SHA-256 is {sha256}, the one recorded on {record.recorded} in "
            f"{folder / RECORD_FILE} is {record.sha256}; delete the file, or the record if you trust the file, then "
            f"{two_ways_out()}"
        )
    return sha256
