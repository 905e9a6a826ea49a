"""Getting VMamba-Tiny's weights: downloaded, checked, converted once to safetensors."""

from __future__ import annotations

import errno
import logging
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pooch
import requests
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import CACHE_VARIABLE, atomic_file, cache_folder
from nnunetv2_lightnets.pretrained.cache import (
    RECORD_FILE,
    VMAMBA_CHECKPOINT,
    VMAMBA_FILE,
    VMAMBA_URLS,
    FileRecord,
    check_file,
    read_records,
    write_record,
)
from nnunetv2_lightnets.pretrained.vmamba import compare_shapes, is_html, read_vmamba, vmamba_tiny_shapes

_LOG = logging.getLogger(__name__)
_TIMEOUT = (10, 60)  # seconds to connect, and of silence
_ATTEMPTS = 4  # at each address


def get_vmamba(
    *, file: Path | None = None, urls: Sequence[str] = VMAMBA_URLS, progress: bool = True, wait: float = 1.0
) -> Path:
    """Put VMamba-Tiny's ImageNet weights into the cache folder, as safetensors, and return their path.

    What is there already is checked and kept. Size and SHA-256 of the checkpoint are recorded the first time; later
    ones must be the same. Several processes at once wait for each other.

    Args:
        file: take this checkpoint (``.pth`` or ``.safetensors``) instead of downloading.
        urls: addresses to try in turn.
        progress: show a progress bar on a terminal.
        wait: seconds before the second attempt at an address, doubled each time.

    Raises:
        LightNetsError: no address gives the file, it is not VMamba-Tiny's checkpoint or not the one recorded, or the
            cache folder cannot be written. No half-written file is left.
    """
    folder = cache_folder()
    if file is None and _ready(folder):  # also where the cache may only be read
        return folder / VMAMBA_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if file is not None:
                _from_file(file, folder)
            elif not _ready(folder):
                _from_internet(urls, folder, progress, wait)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise LightNetsError(
            f"cannot write to {folder}: {error.strerror or error}; {'free 200 MB' if full else 'make it writable'} "
            f"or set {CACHE_VARIABLE} to another folder, then run this again"
        ) from error
    return folder / VMAMBA_FILE


def _one_at_a_time(folder: Path) -> AbstractContextManager[object]:
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _LOG.warning("another process is getting the weights into %s; waiting for it", folder)
        return lock.acquire()


def _ready(folder: Path) -> bool:
    """Whether the weights are in ``folder``, as recorded; raises if they are not as recorded."""
    if not (folder / VMAMBA_FILE).is_file() or VMAMBA_FILE not in read_records(folder):
        return False
    check_file(folder / VMAMBA_FILE)
    return True


def _from_file(file: Path, folder: Path) -> None:
    if not file.is_file():
        raise LightNetsError(f"--from: there is no file {file}; give the downloaded {VMAMBA_CHECKPOINT}")
    tensors, source = read_vmamba(file)
    name = VMAMBA_CHECKPOINT if zipfile.is_zipfile(file) else VMAMBA_FILE
    sha256 = check_file(file, name, folder)
    if not (_ready(folder) and name in read_records(folder)):
        _convert(file, tensors, source or f"{file.resolve()} (SHA-256 {sha256})", folder)
        if name == VMAMBA_CHECKPOINT:
            write_record(folder, name, FileRecord.of(file, str(file.resolve())))


def _from_internet(urls: Sequence[str], folder: Path, progress: bool, wait: float) -> None:
    scratch = folder / "download"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        checkpoint = scratch / VMAMBA_CHECKPOINT
        url = _download(urls, checkpoint, read_records(folder).get(VMAMBA_CHECKPOINT), progress, wait)
        record = FileRecord.of(checkpoint, url)
        tensors, _ = read_vmamba(checkpoint)
        _convert(checkpoint, tensors, f"{url} (SHA-256 {record.sha256})", folder)
        write_record(folder, VMAMBA_CHECKPOINT, record)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(urls: Sequence[str], checkpoint: Path, record: FileRecord | None, progress: bool, wait: float) -> str:
    """Download ``checkpoint`` from the first of ``urls`` that has it, as recorded if it is, and return that address."""
    known_hash = f"sha256:{record.sha256}" if record else None
    reasons = []
    for url in urls:
        try:
            _retrieve(url, checkpoint, known_hash, progress, wait)
        except requests.RequestException as error:
            reasons.append(f"{url}: {_reason(error)}")
            continue
        except ValueError:  # what pooch raises for another hash
            assert record is not None
            reasons.append(
                f"{url}: not the file recorded on {record.recorded} with SHA-256 {record.sha256} (delete "
                f"{cache_folder() / RECORD_FILE} if you trust the new one)"
            )
            continue
        with checkpoint.open("rb") as file:
            if not is_html(file.read(1024)):
                return url
        reasons.append(f"{url}: an HTML page instead of the file; is a login or proxy page in between?")
        checkpoint.unlink()
    raise LightNetsError(
        f"could not download VMamba-Tiny's weights: {'; '.join(reasons)}; try again later, give a mirror with --url, "
        f"or download {VMAMBA_CHECKPOINT} elsewhere and run `nnUNetv2_lightnets weights --from FILE`"
    )


def _retrieve(url: str, file: Path, known_hash: str | None, progress: bool, wait: float) -> None:
    """Download with pooch, which makes one attempt, and writes ``file`` whole or not at all."""
    pooch.get_logger().setLevel("WARNING")  # what it says at "INFO" is for programmers
    downloader = pooch.HTTPDownloader(
        progressbar=progress and sys.stderr.isatty(), timeout=_TIMEOUT, chunk_size=1 << 16
    )
    for attempt in range(_ATTEMPTS):
        try:
            pooch.retrieve(url, known_hash, file.name, file.parent, downloader=downloader)
            return
        except requests.RequestException as error:
            if attempt == _ATTEMPTS - 1 or not _passing(error):
                raise
        time.sleep(wait * 2**attempt)


def _convert(checkpoint: Path, tensors: Mapping[str, torch.Tensor], source: str, folder: Path) -> None:
    """Write ``tensors`` to ``folder`` as safetensors, whole or not at all, and record that file."""
    if problems := compare_shapes(vmamba_tiny_shapes(), tensors):
        raise LightNetsError(f"{checkpoint} is not VMamba-Tiny; {problems}; take the published {VMAMBA_CHECKPOINT}")
    plain = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    target = folder / VMAMBA_FILE
    with atomic_file(target) as file:
        file.write(save(plain, {"source": source}))
        file.flush()
        target.unlink(missing_ok=True)  # so that no moment has a file beside the record of another
        write_record(folder, VMAMBA_FILE, FileRecord.of(Path(file.name), source))


def _passing(error: requests.RequestException) -> bool:
    """Whether another attempt may succeed: not where the address is wrong or the server knows no such file."""
    if error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return not isinstance(error, ValueError)


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    innermost: BaseException = error
    while innermost.__context__ and not isinstance(error, ValueError):
        innermost = innermost.__context__  # requests wraps urllib3, which wraps the socket's error
    return str(innermost).replace("\n", " ") or type(innermost).__name__
