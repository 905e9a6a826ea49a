"""Section c: what does a training step cost, and a forward pass, beside nnU-Net's own network?

Networks are built as nnU-Net builds them, from the plans that it makes for the patch, and trained by their trainer's
``train_step`` with mixed precision, on random data. Without nnU-Net they come from the registry with a plain step
(cross-entropy, AdamW), and the row of nnU-Net's network says what is missing.

``seconds`` are medians; ``first s`` is the first call, which compiles. ``peak MB`` is the peak of torch's allocator.
``profile.txt`` has the kernels of a step of LightM-UNet by their time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpu_sections.bench import Bench, Table, peak_memory, start_memory, timed
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import last_line, write_atomically
from nnunetv2_lightnets.networks import create_network, list_networks, network_entry

TABLE = Table("networks.csv", ("what", "trainer", "patch", "batch", "way"), ("seconds", "first s", "peak MB"))
STEP, FORWARD, PROFILE = "training step", "forward", "profile"
BASELINE = "nnUNetTrainer"
COMPILE = "nnUNet_compile"  # nnU-Net's variable
SIZES = {3: ((128, 128, 128), 2), 2: ((512, 512), 12)}  # patch and batch, by dimensions
TOY_SIZES = {3: ((16, 16, 16), 2), 2: ((32, 32), 2)}
CHANNELS, CLASSES = 1, 3
MAIN = (  # the most telling first
    ("nnUNetTrainerLightMUNetS", 3),
    (BASELINE, 3),
    ("nnUNetTrainerLightMUNet", 3),
    ("nnUNetTrainerULite", 3),
    ("nnUNetTrainerUltraLightUNet", 3),
    ("nnUNetTrainerSwinUMamba", 2),
    (BASELINE, 2),
    ("nnUNetTrainerSwinUMambaD", 2),
    ("nnUNetTrainerUMambaBot", 3),
    ("nnUNetTrainerUMambaEnc", 3),
)
COMPILED = (*MAIN[:3], *MAIN[5:7])
TOY_MAIN = (MAIN[0], (BASELINE, 2), ("nnUNetTrainerULite", 2))  # all but the first are compiled, too
PROFILED = (MAIN[0], MAIN[2])
# The same networks by their name in the registry, for a machine without nnU-Net.
BY_TRAINER: dict[str, tuple[str, dict[str, Any]]] = {
    "nnUNetTrainerLightMUNetS": ("lightm_unet", {"width": 16}),
    "nnUNetTrainerLightMUNet": ("lightm_unet", {"width": 32}),
    "nnUNetTrainerULite": ("ulite", {}),
    "nnUNetTrainerUltraLightUNet": ("ultralight_unet", {}),
    "nnUNetTrainerSwinUMamba": ("swin_umamba", {}),
    "nnUNetTrainerSwinUMambaD": ("swin_umamba_d", {}),
    "nnUNetTrainerUMambaBot": ("umamba_bot", {}),
    "nnUNetTrainerUMambaEnc": ("umamba_enc", {}),
}


def run(bench: Bench) -> None:
    """Measure the main networks first, then all others."""
    missing = without_nnunet()
    if missing:
        print(
            f"nnU-Net is missing ({missing}): networks come from the registry, with a plain training step", flush=True
        )
    main = TOY_MAIN if bench.toy else MAIN
    others = () if bench.toy else [key for key in all_trainers(missing) if key not in MAIN]
    for trainer, dims in main:
        step_row(bench, trainer, dims, missing, compiled=False)
    for trainer, dims in main[:1] if bench.toy else PROFILED:
        row(bench, PROFILE, trainer, dims, "AMP", partial(write_profile, bench, trainer, dims, missing), 12)
    for trainer, dims in TOY_MAIN[1:] if bench.toy else COMPILED:
        step_row(bench, trainer, dims, missing, compiled=True)
    for way in ("AMP", "CPU"):
        for trainer, dims in [*main, *others]:
            row(
                bench,
                FORWARD,
                trainer,
                dims,
                way,
                partial(forward, bench, trainer, dims, way, missing),
                15,
            )
    for trainer, dims in others:
        step_row(bench, trainer, dims, missing, compiled=False)
    for trainer, dims in () if bench.toy else [*main, *others]:
        step_row(bench, trainer, dims, missing, compiled=True)


def without_nnunet() -> str | None:
    """Why nnU-Net's trainers cannot be imported here, None if they can."""
    try:
        importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    except Exception as error:  # a package that it needs may fail in any way
        return last_line(error)
    return None


def all_trainers(missing: str | None) -> Iterator[tuple[str, int]]:
    """Trainers, or without nnU-Net the registry's networks, and dimensions."""
    for dims in (3, 2):
        if missing:
            known = {name for name, _ in BY_TRAINER.values()}
            yield from ((name, dims) for name in list_networks(dims) if name not in known)
        else:
            from nnunetv2_lightnets.costs.trainers import fitting_trainers

            yield from ((name, dims) for name in fitting_trainers(dims))


def row(
    bench: Bench, what: str, trainer: str, dims: int, way: str, compute: Callable[[], dict[str, Any]], seconds: float
) -> None:
    """One row."""
    patch, batch = (TOY_SIZES if bench.toy else SIZES)[dims]
    size = "×".join(map(str, patch))
    names = (what, trainer, size, 1 if what == FORWARD else batch, way)
    bench.rows.measure(names, compute, 1 if bench.toy else seconds)


def step_row(bench: Bench, trainer: str, dims: int, missing: str | None, compiled: bool) -> None:
    """The row of a training step."""
    way = "AMP, compiled" if compiled else "AMP"

    def compute() -> dict[str, Any]:
        start_memory(bench.device)
        with Training(bench, trainer, dims, missing, compiled) as training:
            timing = timed(training.step, bench.device, 2 if bench.toy else 10, 0.1 if bench.toy else 3)
        values = {"seconds": f"{timing.median:.4g}", "first s": f"{timing.first:.3g}"}
        return values | {"peak MB": peak_memory(bench.device)}

    row(bench, STEP, trainer, dims, way, compute, 60 if compiled else 8)


class Training:
    """A network with a training step, of nnU-Net's trainer or a plain one; a context, which leaves no files behind."""

    step: Callable[[], object]

    def __init__(self, bench: Bench, trainer: str, dims: int, missing: str | None, compiled: bool) -> None:
        self.bench, self.trainer, self.missing, self.compiled = bench, trainer, missing, compiled
        self.patch, self.batch = (TOY_SIZES if bench.toy else SIZES)[dims]

    def __enter__(self) -> Training:
        """Build it."""
        self.folders: Any = nullcontext()
        if self.missing:
            self.step = self._plain()
            return self
        from nnunetv2_lightnets.nnunet.folders import temporary_folders

        self.folders = temporary_folders()
        folder = self.folders.__enter__()
        try:
            self.step = self._nnunet(folder)
        except BaseException:
            self.folders.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Give back what it took."""
        self.folders.__exit__(None, None, None)
        torch._dynamo.reset()

    def _nnunet(self, folder: Any) -> Callable[[], object]:
        from nnunetv2_lightnets.costs.trainers import find_trainer_class
        from nnunetv2_lightnets.nnunet.plans import patch_setting
        from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer

        os.environ[COMPILE] = "t" if self.compiled else "f"
        setting = patch_setting(self.patch, CHANNELS, CLASSES)
        trainer = make_trainer(find_trainer_class(self.trainer), setting, self.batch, folder, self.bench.device)
        batch = make_batch(trainer, setting.patch, self.batch)
        if self.bench.device.type == "cuda":  # as nnU-Net's data loaders hand them over
            target = batch["target"]
            pinned = [x.pin_memory() for x in target] if isinstance(target, list) else target.pin_memory()
            batch = {"data": batch["data"].pin_memory(), "target": pinned}
        trainer.network.train()
        return lambda: trainer.train_step(batch)

    def _plain(self) -> Callable[[], object]:
        device = self.bench.device
        network = registered(self.trainer, self.patch, self.missing, supervised=True).to(device).train()
        called = compiled_network(network, self.bench) if self.compiled else network
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        data = torch.randn(self.batch, CHANNELS, *self.patch, device=device)
        targets: list[torch.Tensor] = []

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, enabled=device.type == "cuda"):
                answers = called(data)
                answers = answers if isinstance(answers, list) else [answers]
                if not targets:
                    sizes = [(self.batch, *answer.shape[2:]) for answer in answers]
                    targets.extend(torch.randint(CLASSES, size, device=device) for size in sizes)
                pairs = zip(answers, targets, strict=True)
                loss = torch.stack([F.cross_entropy(answer.float(), target) for answer, target in pairs]).sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            scaler.step(optimizer)
            scaler.update()

        return step


def compiled_network(network: nn.Module, bench: Bench) -> Any:
    """As nnU-Net compiles; a dry run only traces."""
    return torch.compile(network, backend="aot_eager" if bench.toy else "inductor")


def registered(trainer: str, patch: Sequence[int], missing: str | None, supervised: bool) -> nn.Module:
    """A network without nnU-Net.

    Raises:
        LightNetsError: it is nnU-Net's own.
    """
    if trainer == BASELINE:
        raise LightNetsError(f"nnU-Net is missing: {missing}")
    name, settings = BY_TRAINER.get(trainer, (trainer, {}))
    if name in ("umamba_enc", "unetr"):
        settings = settings | {"patch_size": tuple(patch)}
    return create_network(
        name,
        spatial_dims=len(patch),
        input_channels=CHANNELS,
        num_classes=CLASSES,
        deep_supervision=supervised and network_entry(name).deep_supervision,
        **settings,
    )


def forward(bench: Bench, trainer: str, dims: int, way: str, missing: str | None) -> dict[str, Any]:
    """One patch through the network as it predicts, on the device or on a CPU."""
    patch, _ = (TOY_SIZES if bench.toy else SIZES)[dims]
    device = torch.device("cpu") if way == "CPU" else bench.device
    network = for_prediction(trainer, patch, missing).to(device).eval()
    x = torch.randn(1, CHANNELS, *patch, device=device)
    start_memory(device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
        timing = timed(lambda: network(x), device, 2 if bench.toy else 10, 0.1 if bench.toy else 2)
    return {"seconds": f"{timing.median:.4g}", "first s": f"{timing.first:.3g}", "peak MB": peak_memory(device)}


def for_prediction(trainer: str, patch: Sequence[int], missing: str | None) -> nn.Module:
    """The network as nnU-Net's predictor builds it."""
    if missing:
        return registered(trainer, patch, missing, supervised=False)
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_lightnets.costs.trainers import find_trainer_class
    from nnunetv2_lightnets.nnunet.plans import patch_setting

    setting = patch_setting(patch, CHANNELS, CLASSES)
    plans = PlansManager(setting.plans)
    configuration = plans.get_configuration(setting.configuration)
    found = find_trainer_class(trainer)
    network: nn.Module = found.build_network_architecture(plans, configuration, CHANNELS, CLASSES, False)
    return network


def write_profile(bench: Bench, trainer: str, dims: int, missing: str | None) -> dict[str, Any]:
    """Kernels of a step, by their time, into ``profile.txt``."""
    activities = [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with Training(bench, trainer, dims, missing, compiled=False) as training:
        for _ in range(2):
            training.step()
        with profile(activities=activities) as found:
            training.step()
    order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    text = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    file = bench.folder / "profile.txt"
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    write_atomically(file, f"{before}{trainer}, one training step\n\n{text}\n\n")
    return {"note": f"in {file.name}"}
