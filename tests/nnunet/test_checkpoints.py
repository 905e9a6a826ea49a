"""Checkpoints: only damage is called damage, another network is named, and each rank has its own random numbers."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.checkpoints import own_random_state, random_states, restore_random_state
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_trainer
from nnunetv2_lightnets.trainers import find_trainer
from two_processes import run_in_two_processes

CPU = torch.device("cpu")
TINY = "nnUNetTrainerUltraLightUNetT"


@pytest.fixture
def made() -> Iterator[Callable[..., Any]]:
    """Maker of initialized trainers on a free patch."""
    with contextlib.ExitStack() as stack:

        def make(name: str = TINY, classes: int = 2) -> Any:
            folder = stack.enter_context(temporary_folders())
            trainer_class = find_trainer(name)
            assert trainer_class is not None
            with contextlib.redirect_stdout(io.StringIO()):
                return make_trainer(trainer_class, patch_setting([32, 32], 1, classes), 2, folder, CPU)

        yield make


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        del content[-1000:]
    elif how == "empty":
        content.clear()
    elif how == "overwritten":
        content[:] = b"not a checkpoint" * 100
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "overwritten"])
def test_a_damaged_file_is_named(how: str, made: Callable[..., Any], tmp_path: Path) -> None:
    trainer, file = made(), tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    damage(file, how)
    with pytest.raises(LightNetsError, match=r"checkpoint_latest\.pth cannot be read .* damaged: move it away"):
        trainer.load_checkpoint(str(file))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        PermissionError(13, "Permission denied", "checkpoint_latest.pth"),
        ModuleNotFoundError("No module named 'of_an_older_numpy'"),
    ],
)
@pytest.mark.parametrize(
    "where", ["torch.load", "torch.nn.Module.load_state_dict", "torch.optim.Optimizer.load_state_dict"]
)
def test_a_good_file_is_never_called_damaged(
    error: Exception, where: str, made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, file = made(), tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"torch.{where}", fail)
    with pytest.raises(type(error)) as caught:
        trainer.load_checkpoint(str(file))
    assert caught.value is error


def test_a_missing_file_is_a_missing_file(made: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        made().load_checkpoint(str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("theirs", "classes", "words"),
    [
        ("nnUNetTrainerULite", 2, "is of another network, nnUNetTrainerULite (nnUNetPlans, free, 2 labels)"),
        (TINY, 3, f"is of another network, {TINY} (nnUNetPlans, free, 3 labels)"),
        ("nnUNetTrainerUltraLightUNet", 2, " in the checkpoint and (4, 2, 1, 1) here"),
    ],
)
def test_another_network_is_one_line_that_names_both(
    theirs: str, classes: int, words: str, made: Callable[..., Any], tmp_path: Path
) -> None:
    file = str(tmp_path / "checkpoint_final.pth")
    made(theirs, classes).save_checkpoint(file)
    with pytest.raises(LightNetsError) as caught:
        made().load_checkpoint(file)
    line = str(caught.value)
    assert words in line
    assert f"this training is {TINY} (nnUNetPlans, free, 2 labels): " in line
    assert "\n" not in line and len(line) < 600 and "damaged" not in line


def test_keys_that_are_too_many_are_another_network(made: Callable[..., Any], tmp_path: Path) -> None:
    trainer, file = made(), str(tmp_path / "checkpoint_final.pth")
    trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=False)
    content["network_weights"]["one.more"] = torch.zeros(1)
    torch.save(content, file)
    with pytest.raises(LightNetsError, match=r"one\.more of the checkpoint is not in the network"):
        trainer.load_checkpoint(file)


def test_weights_alone_are_no_checkpoint(made: Callable[..., Any], tmp_path: Path) -> None:
    trainer, file = made(), tmp_path / "weights.pth"
    torch.save(trainer.network.state_dict(), file)
    with pytest.raises(LightNetsError, match="is none of an nnU-Net training"):
        trainer.load_checkpoint(str(file))


@pytest.mark.parametrize("keyword", [None, "filename_or_checkpoint", "checkpoint"])
def test_it_is_loaded_by_either_name_of_the_argument(
    keyword: str | None, made: Callable[..., Any], tmp_path: Path
) -> None:
    """nnU-Net's next release calls ``filename_or_checkpoint`` ``checkpoint``."""
    trainer, file = made(), str(tmp_path / "checkpoint_final.pth")
    trainer.current_epoch = 3
    trainer.save_checkpoint(file)
    other = made()
    other.load_checkpoint(*([] if keyword else [file]), **({keyword: file} if keyword else {}))
    assert other.current_epoch == 4


# --- random numbers --------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.save(random_states(CPU), tmp_path / "states")
    expected = draw()
    draw()
    state = own_random_state(torch.load(tmp_path / "states", weights_only=False), 0)
    assert state is not None
    restore_random_state(state, CPU)
    assert draw() == expected


def test_what_a_rank_has() -> None:
    (state,) = random_states(CPU)
    assert own_random_state([state, "second"], 1) == "second"
    assert own_random_state(state, 0) is state  # as older versions saved it
    for nothing in (own_random_state(state, 1), own_random_state([state], 1), own_random_state(None, 0)):
        assert nothing is None


def one_of_two_processes(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    states = random_states(CPU)
    expected = draw()
    if rank == 0:
        torch.save(states, folder / "checkpoint")
    torch.distributed.barrier()
    state = own_random_state(torch.load(folder / "checkpoint", weights_only=False), rank)
    assert state is not None
    restore_random_state(state, CPU)
    assert draw() == expected
    torch.save(expected, folder / f"drawn by {rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_each_of_two_ranks_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    run_in_two_processes(__file__, tmp_path)
    first, second = (torch.load(tmp_path / f"drawn by {rank}") for rank in range(2))
    assert not set(first) & set(second)


if __name__ == "__main__":
    one_of_two_processes(int(sys.argv[2]), Path(sys.argv[1]))
