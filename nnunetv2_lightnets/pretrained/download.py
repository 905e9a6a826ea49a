"""Getting VMamba-Tiny's weights: downloaded with resume, checked, converted once to safetensors."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pooch
import requests
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from tqdm import tqdm

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.pretrained.cache import (
    CACHE_VARIABLE,
    RECORD_FILE,
    VMAMBA_CHECKPOINT,
    VMAMBA_FILE,
    VMAMBA_URLS,
    FileRecord,
    cache_folder,
    check_file,
    read_records,
    write_record,
)
from nnunetv2_lightnets.pretrained.vmamba import compare_shapes, is_html, read_vmamba, vmamba_tiny_shapes

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 14  # bytes; of a cut connection the last, unfinished chunk is lost
_TIMEOUT = (10, 60)  # seconds to connect, and of silence


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
            cache folder cannot be written. No half-written file is left, but a cut download is: the next call goes
            on with it.
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
            f"or set {CACHE_VARIABLE} to another folder, then run this again; a cut download goes on where it ended"
        ) from error
    return folder / VMAMBA_FILE


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _LOG.warning("another process is getting the weights into %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
    checkpoint = folder / VMAMBA_CHECKPOINT
    downloader = ResumingDownloader(checkpoint, wait=wait, progress=progress)
    _download(urls, checkpoint, downloader)
    url = downloader.note["url"]
    record = FileRecord.of(checkpoint, url)
    try:
        tensors, _ = read_vmamba(checkpoint)
        _convert(checkpoint, tensors, f"{url} (SHA-256 {record.sha256})", folder)
    except LightNetsError:
        checkpoint.unlink()  # not what it should be: never to be taken again
        downloader.note_file.unlink(missing_ok=True)
        raise
    write_record(folder, VMAMBA_CHECKPOINT, record)
    checkpoint.unlink()
    downloader.note_file.unlink(missing_ok=True)


def _download(urls: Sequence[str], checkpoint: Path, downloader: ResumingDownloader) -> None:
    """Download ``checkpoint`` from the first of ``urls`` that has it, as recorded if it is recorded."""
    record = read_records(checkpoint.parent).get(VMAMBA_CHECKPOINT)
    known_hash = f"sha256:{record.sha256}" if record else None
    pooch.get_logger().setLevel("WARNING")  # what it says at "INFO" is for programmers
    reasons = []
    for url in urls:
        try:
            pooch.retrieve(url, known_hash, checkpoint.name, checkpoint.parent, downloader=downloader)
            return
        except DownloadError as error:  # noqa: PERF203 (few addresses)
            reasons.append(f"{url}: {error}")
        except ValueError as error:  # what pooch raises for another hash
            if record is None:
                raise
            reasons.append(
                f"{url}: not the file recorded on {record.recorded} with SHA-256 {record.sha256} (delete "
                f"{checkpoint.parent / RECORD_FILE} if you trust the new one)"
            )
            _LOG.debug("%s", error)
    raise LightNetsError(
        f"could not download VMamba-Tiny's weights: {'; '.join(reasons)}; try again later, give a mirror with --url, "
        f"or download {VMAMBA_CHECKPOINT} elsewhere and run `nnUNetv2_lightnets weights --from FILE`"
    )


def _convert(checkpoint: Path, tensors: Mapping[str, torch.Tensor], source: str, folder: Path) -> None:
    """Write ``tensors`` to ``folder`` as safetensors, whole or not at all, and record that file."""
    if problems := compare_shapes(vmamba_tiny_shapes(), tensors):
        raise LightNetsError(f"{checkpoint} is not VMamba-Tiny; {problems}; take the published {VMAMBA_CHECKPOINT}")
    plain = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    target, temporary = folder / VMAMBA_FILE, folder / f"{VMAMBA_FILE}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(save(plain, {"source": source}))
            file.flush()
            os.fsync(file.fileno())
        target.unlink(missing_ok=True)  # so that no moment has a file beside the record of another
        write_record(folder, VMAMBA_FILE, FileRecord.of(temporary, source))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class DownloadError(Exception):
    """Why one address did not give the file; the next one is tried."""


@dataclass
class ResumingDownloader:
    """A downloader for pooch that goes on where a cut download ended, in this run or an earlier one.

    What has come lies in ``<file>.part``, and in ``<file>.json`` a note of where it came from; pooch's own temporary
    file receives it when it is whole.
    """

    file: Path
    attempts: int = 4  # in a row without a new byte
    wait: float = 1.0  # seconds before the second attempt, doubled each time
    progress: bool = True

    @property
    def part(self) -> Path:
        """What has come so far."""
        return self.file.with_name(self.file.name + ".part")

    @property
    def note_file(self) -> Path:
        """Where it came from."""
        return self.file.with_name(self.file.name + ".json")

    @property
    def note(self) -> dict[str, str]:
        """``url`` and ``etag`` (empty if none) of what lies in ``part``, or lay there last."""
        try:
            note = json.loads(self.note_file.read_text("utf-8"))
            return {"url": str(note["url"]), "etag": str(note["etag"])}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return {"url": "", "etag": ""}

    def held(self, url: str) -> int:
        """Bytes of ``url`` that are in ``part``; 0 if what is there came from elsewhere."""
        return self.part.stat().st_size if self.part.is_file() and self.note["url"] == url else 0

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        """Download ``url`` to ``output_file``; pooch calls this.

        Raises:
            DownloadError: the address does not have the file, gives a web page, or breaks off again and again.
            OSError: the file cannot be written.
        """
        failed = 0
        while True:
            before = self.held(url)
            try:
                self._fetch(url)
                break
            except requests.RequestException as error:
                failed = 1 if self.held(url) > before else failed + 1
                if failed >= self.attempts or not _passing(error):
                    raise DownloadError(_reason(error)) from error
                time.sleep(self.wait * 2 ** (failed - 1))
        os.replace(self.part, output_file)

    def _fetch(self, url: str) -> None:
        held = self.held(url)
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could not be resumed by its bytes
        if held:
            headers["Range"] = f"bytes={held}-"
            if etag := self.note["etag"]:
                headers["If-Range"] = etag  # the whole file instead, should it have changed
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            content_range = response.headers.get("Content-Range", "")
            if response.status_code == 416:  # nothing behind what is held: it is all, or of another file
                if content_range == f"bytes */{held}":
                    return
                self._start_over()
            response.raise_for_status()
            if response.status_code == 206:
                sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
                if sent is None or int(sent[1]) != held:
                    self._start_over()
                total: int | None = int(sent[2])
            else:
                held = 0  # the whole file
                length = response.headers.get("Content-Length")
                total = int(length) if length else None
            content = response.iter_content(_CHUNK)
            chunk = next(content, b"")
            if not held and is_html(chunk):
                raise DownloadError("an HTML page instead of the file; is a login or proxy page in between?")
            with (
                self.part.open("ab" if held else "wb") as file,
                tqdm(
                    desc=self.file.name,
                    initial=held,
                    total=total,
                    unit="B",
                    unit_scale=True,
                    disable=None if self.progress else True,  # None: where there is no terminal
                ) as bar,
            ):
                etag = response.headers.get("ETag", "")
                note = {"url": url, "etag": "" if etag.startswith("W/") else etag}  # If-Range takes no weak ones
                self.note_file.write_text(json.dumps(note), "utf-8")
                while chunk:
                    file.write(chunk)
                    bar.update(len(chunk))
                    chunk = next(content, b"")
        if total is not None and self.part.stat().st_size != total:
            raise requests.ConnectionError(f"the connection was cut at {self.part.stat().st_size:,} of {total:,} bytes")

    def _start_over(self) -> NoReturn:
        self.part.unlink(missing_ok=True)
        raise requests.ConnectionError("the file on the server is not the one that a part was downloaded of")


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
