"""`nnUNetv2_lightnets weights` against a real web server on loopback: what works, and what is left when it does not."""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.files import CACHE_VARIABLE, cache_folder
from nnunetv2_lightnets.networks.swin_umamba_d import SwinUMambaD
from nnunetv2_lightnets.pretrained import cli, load_vmamba, vmamba_path
from nnunetv2_lightnets.pretrained.cache import (
    RECORD_FILE,
    VMAMBA_CHECKPOINT,
    VMAMBA_FILE,
    VMAMBA_URLS,
    read_records,
)
from nnunetv2_lightnets.pretrained.download import get_vmamba
from nnunetv2_lightnets.pretrained.vmamba import vmamba_tiny_shapes

# Percent-encoded as the published addresses are.
FIRST = "/VMamba/releases/download/%2320240218/" + VMAMBA_CHECKPOINT
SECOND = "/VMamba/releases/download/%23v0cls/" + VMAMBA_CHECKPOINT
CUT = 50_000  # bytes


@pytest.fixture(autouse=True)
def _short_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """VMamba-Tiny is what the short layout says, but for tests at full size."""
    if "full_size" not in request.node.name:
        shapes = request.getfixturevalue("short_layout")
        monkeypatch.setattr("nnunetv2_lightnets.pretrained.download.vmamba_tiny_shapes", lambda: shapes)


def get(site: Any, *paths: str) -> Path:
    return get_vmamba(urls=[site.url + path for path in paths or (FIRST, SECOND)], progress=False, wait=0.0)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(LightNetsError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_whole(cache: Path, state: dict[str, Tensor]) -> None:
    """The converted file holds the checkpoint's tensors, and nothing else lies about."""
    assert sorted(file.name for file in cache.iterdir()) == [".lock", RECORD_FILE, VMAMBA_FILE]
    with safe_open(cache / VMAMBA_FILE, framework="pt") as file:
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in state.items())


def test_published_addresses() -> None:
    releases = "https://github.com/MzeroMiko/VMamba/releases/download"
    names = ("%2320240218", "%23v0cls")  # "#" in a path must not start a fragment
    assert tuple(f"{releases}/{name}/vssmtiny_dp01_ckpt_epoch_292.pth" for name in names) == VMAMBA_URLS


def test_cache_folder_is_the_variables_or_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert vmamba_path() == tmp_path / VMAMBA_FILE
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "nnunetv2_lightnets" in cache_folder().parts


# --- it works -------------------------------------------------------------------------------------------------------


def test_download_converts_and_records(
    site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]
) -> None:
    site.content[FIRST] = checkpoint_bytes
    path = get(site)
    assert path == cache / VMAMBA_FILE
    assert_whole(cache, state)
    assert site.requests == [FIRST]  # sent as it was given, percent-encoding and all
    records = read_records(cache)
    assert records[VMAMBA_CHECKPOINT].sha256 == hashlib.sha256(checkpoint_bytes).hexdigest()
    assert records[VMAMBA_CHECKPOINT].size == len(checkpoint_bytes)
    assert records[VMAMBA_CHECKPOINT].source == site.url + FIRST
    assert records[VMAMBA_FILE].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert get(site) == path  # the second time nothing is asked of the server
    assert len(site.requests) == 1


def test_second_address_where_the_first_has_it_not(site: Any, cache: Path, checkpoint_bytes: bytes) -> None:
    site.content[SECOND] = checkpoint_bytes
    get(site)
    assert site.requests == [FIRST, SECOND]
    assert read_records(cache)[VMAMBA_CHECKPOINT].source == site.url + SECOND


def test_redirect(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    site.redirects = {FIRST: "/signed?token=1", "/signed?token=1": "/storage"}
    site.content["/storage"] = checkpoint_bytes
    get(site)
    assert_whole(cache, state)


def test_a_cut_connection_is_tried_again(
    site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]
) -> None:
    site.content[FIRST] = checkpoint_bytes
    site.cut_after = [CUT, 0, 2 * CUT]
    get(site)
    assert site.requests == [FIRST] * 4
    assert_whole(cache, state)


def test_a_connection_cut_again_and_again_leaves_nothing(
    site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]
) -> None:
    site.content[FIRST] = checkpoint_bytes
    site.cut_after = [CUT, CUT, CUT, 0]
    assert "IncompleteRead(0 bytes read" in refused(lambda: get(site, FIRST))
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]
    get(site)
    assert_whole(cache, state)


def test_what_a_killed_run_left_is_cleared(
    site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]
) -> None:
    site.content[FIRST] = checkpoint_bytes
    (cache / "download").mkdir(parents=True)
    (cache / "download" / "tmp123").write_bytes(bytes(1000))
    (cache / "download" / VMAMBA_CHECKPOINT).write_bytes(bytes(1000))
    get(site)
    assert_whole(cache, state)


def test_passing_server_errors_are_waited_for(site: Any, cache: Path, checkpoint_bytes: bytes) -> None:
    site.content[FIRST] = checkpoint_bytes
    site.statuses = [503, 429, 500]
    get(site)
    assert len(site.requests) == 4


def test_progress_is_shown_on_a_terminal(
    site: Any,
    cache: Path,
    checkpoint_bytes: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.content[FIRST] = checkpoint_bytes
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    get_vmamba(urls=[site.url + FIRST])
    assert "100%" in capsys.readouterr().err


def test_several_at_once_download_once(
    site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]
) -> None:
    site.content[FIRST], site.pause = checkpoint_bytes, 0.01
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get(site))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / VMAMBA_FILE] * 4
    assert len(site.requests) == 1
    assert_whole(cache, state)


# --- without internet -----------------------------------------------------------------------------------------------


def test_from_file(cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "copied.pth"
    file.write_bytes(checkpoint_bytes)
    get_vmamba(file=file)
    assert_whole(cache, state)
    assert file.read_bytes() == checkpoint_bytes  # the user's own file stays
    before = (cache / VMAMBA_FILE).stat().st_mtime_ns
    get_vmamba(file=file)  # the same again: nothing to do
    assert (cache / VMAMBA_FILE).stat().st_mtime_ns == before


def test_from_a_file_converted_elsewhere(
    site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor], tmp_path: Path
) -> None:
    site.content[FIRST] = checkpoint_bytes
    converted = tmp_path / "from another machine"
    shutil.move(get(site), converted)
    shutil.rmtree(cache)
    get_vmamba(file=converted)
    assert_whole(cache, state)
    assert site.url + FIRST in read_records(cache)[VMAMBA_FILE].source  # where it first came from is still known


def test_cache_that_may_only_be_read(
    site: Any, cache: Path, checkpoint_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.content[FIRST] = checkpoint_bytes
    path = get(site)

    def no_writing(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nnunetv2_lightnets.pretrained.download.FileLock", no_writing)
    assert get(site) == path
    path.unlink()
    message = refused(lambda: get(site))
    assert f"cannot write to {cache}: Permission denied; make it writable or set {CACHE_VARIABLE}" in message


def test_from_a_file_that_is_not_there(cache: Path) -> None:
    message = refused(lambda: get_vmamba(file=Path("nowhere.pth")))
    assert "there is no file nowhere.pth" in message


def test_from_a_file_of_another_size_of_vmamba(
    cache: Path, state: dict[str, Tensor], save_checkpoint: Callable[..., Path]
) -> None:
    small = {key: tensor for key, tensor in state.items() if "layers.0.blocks.1." not in key}
    message = refused(lambda: get_vmamba(file=save_checkpoint(small)))
    assert "is not VMamba-Tiny; missing: 13 (layers.0.blocks.1.ln_1.weight, " in message
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]


# --- it fails, and leaves nothing wrong behind ----------------------------------------------------------------------


def test_neither_address_has_it(site: Any, cache: Path) -> None:
    message = refused(lambda: get(site))
    assert f"{site.url}{FIRST}: HTTP 404 Not Found; {site.url}{SECOND}: HTTP 404 Not Found" in message
    assert "--from FILE" in message and "--url" in message
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]


def test_no_server(cache: Path) -> None:
    message = refused(lambda: get_vmamba(urls=["http://127.0.0.1:9/x", "nowhere"], progress=False, wait=0.0))
    assert "http://127.0.0.1:9/x: [Errno" in message and "refused" in message
    assert "nowhere: Invalid URL" in message


def test_html_page_with_status_200(site: Any, cache: Path, checkpoint_bytes: bytes) -> None:
    site.content[FIRST] = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    site.content[SECOND] = checkpoint_bytes
    assert "an HTML page instead of the file" in refused(lambda: get(site, FIRST))
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]
    get(site)  # the next address may do better
    assert read_records(cache)[VMAMBA_CHECKPOINT].source == site.url + SECOND


def test_another_file_on_second_use(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    site.content[FIRST] = checkpoint_bytes
    get(site).unlink()
    site.content[FIRST] = checkpoint_bytes[:-1] + bytes([checkpoint_bytes[-1] ^ 1])
    message = refused(lambda: get(site, FIRST))
    assert "not the file recorded on" in message and hashlib.sha256(checkpoint_bytes).hexdigest() in message
    assert sorted(file.name for file in cache.iterdir()) == [".lock", RECORD_FILE]
    site.content[SECOND] = checkpoint_bytes  # while the other address still has the right one
    get(site)
    assert_whole(cache, state)


def test_other_file_given_by_hand_on_second_use(
    site: Any, cache: Path, checkpoint_bytes: bytes, save_checkpoint: Callable[..., Path], state: dict[str, Tensor]
) -> None:
    site.content[FIRST] = checkpoint_bytes
    get(site)
    assert "is not the file first used" in refused(
        lambda: get_vmamba(file=save_checkpoint(state, epoch=1, pad="x" * 999_999))
    )
    assert_whole(cache, state)


def test_changed_file_in_the_cache(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    site.content[FIRST] = checkpoint_bytes
    path = get(site)
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(b"changed")
    assert "is not the file first used" in refused(lambda: get(site))
    path.unlink()  # as the message says
    get(site)
    assert_whole(cache, state)


def test_wrong_content_is_not_kept(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    site.content[FIRST] = b"something else entirely"
    assert "neither a PyTorch checkpoint" in refused(lambda: get(site))
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]  # and nothing recorded
    site.content[FIRST] = checkpoint_bytes
    get(site)
    assert_whole(cache, state)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a full disk does, the system refuses to make any file longer than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_while_downloading(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    site.content[FIRST] = checkpoint_bytes
    with largest_file(100_000):
        message = refused(lambda: get(site))
    assert f"cannot write to {cache}: File too large; free 200 MB or set {CACHE_VARIABLE}" in message
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]
    get(site)
    assert_whole(cache, state)


def test_disk_full_while_converting(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    site.content[FIRST] = checkpoint_bytes
    with largest_file(300_000):
        assert "File too large" in refused(lambda: get(site))
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]
    get(site)
    assert read_records(cache)[VMAMBA_CHECKPOINT].source == site.url + FIRST
    assert_whole(cache, state)


@pytest.mark.parametrize(
    "where",
    [
        "pretrained.download.save",
        "files.os.fsync",
        "files.os.replace",
        "pretrained.download.write_record",
        "pretrained.download.read_vmamba",
    ],
)
def test_interrupted_while_converting(
    where: str,
    site: Any,
    cache: Path,
    checkpoint_bytes: bytes,
    state: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site.content[FIRST] = checkpoint_bytes
    replace = os.replace

    def interrupt(*arguments: Any) -> None:
        if where == "files.os.replace" and not str(arguments[1]).endswith(VMAMBA_FILE):
            return replace(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"nnunetv2_lightnets.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(site)
    assert {file.name for file in cache.iterdir()} <= {".lock", RECORD_FILE}
    get(site)
    assert_whole(cache, state)


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


def test_command(site: Any, cache: Path, checkpoint_bytes: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    site.content[FIRST] = checkpoint_bytes
    assert run("--url", site.url + FIRST) == 0
    output = capsys.readouterr().out
    record = read_records(cache)[VMAMBA_FILE]
    for part in (str(cache / VMAMBA_FILE), record.sha256, site.url + FIRST):
        assert part in output


def test_command_from_file(cache: Path, checkpoint_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(checkpoint_bytes)
    assert run("--from", str(tmp_path / "a.pth")) == 0
    assert (cache / VMAMBA_FILE).is_file()


def test_help_names_addresses_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    output = "".join(capsys.readouterr().out.split())
    assert all(url in output for url in VMAMBA_URLS) and CACHE_VARIABLE in output


def test_control_c_leaves_nothing(site: Any, cache: Path, checkpoint_bytes: bytes, state: dict[str, Tensor]) -> None:
    """The real command, the real signal."""
    site.content[FIRST], site.pause = checkpoint_bytes, 1.0
    command = [sys.executable, "-m", "nnunetv2_lightnets.cli", "weights", "--url", site.url + FIRST]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while site.sent < 40_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert sorted(file.name for file in cache.iterdir()) == [".lock"]
    site.pause = 0.0
    get(site)
    assert_whole(cache, state)


def test_full_size_from_the_web_into_a_network(
    site: Any, cache: Path, save_checkpoint: Callable[..., Path], numbered: Callable[..., dict[str, Tensor]]
) -> None:
    """The published layout itself, downloaded at the second attempt; then without the record, as if copied by hand."""
    state = numbered(vmamba_tiny_shapes())
    site.content[FIRST] = save_checkpoint(state).read_bytes()
    site.cut_after = [CUT]
    path = get(site)
    assert_whole(cache, state)

    network = SwinUMambaD(spatial_dims=2, input_channels=3, num_classes=2)
    report = load_vmamba(network, path)
    assert report.tensors == 208
    assert site.url + FIRST in str(report) and read_records(cache)[VMAMBA_CHECKPOINT].sha256 in str(report)
    loaded = network.state_dict()["vssm_encoder.layers.3.blocks.1.ln_1.bias"]
    assert torch.equal(loaded, state["layers.3.blocks.1.ln_1.bias"])

    (cache / RECORD_FILE).unlink()
    assert load_vmamba(network, vmamba_path()).sha256 == report.sha256
