"""What pyproject.toml cannot say: start-up files, and the C library of the selective scan."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

START_UP = ("start_up/nnunetv2_lightnets.pth", "start_up/nnunetv2_lightnets.start")

C_SOURCES = Path("nnunetv2_lightnets/ops/csrc")
LIBRARY = Path("nnunetv2_lightnets/ops/liblightnets.so")  # the name on every platform: ctypes does not mind

# No -ffast-math: infinities and NaNs must come out as such.
C_FLAGS = "-O3 -std=gnu11 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
# Kernels are compiled once for each instruction set (and precision); a set that the compiler does not know is left out.
# Vectors have 16 bytes in the baseline: SSE2, NEON, or whatever the compiler makes of them elsewhere.
INSTRUCTION_SETS = {
    "baseline": "-DVECTOR_BYTES=16",
    "avx2": "-DVECTOR_BYTES=32 -mavx2 -mfma",
    "avx512": "-DVECTOR_BYTES=64 -mavx512f -mavx512vl -mavx512dq -mfma",
}


class _BuildCommand(Command):
    """A step of ``build`` that puts files beside the modules."""

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def get_outputs(self) -> list[str]:
        return []  # nothing that an editable install should map back to the source

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildStartUp(_BuildCommand):
    """Python reads ``.pth`` and ``.start`` files only at the root of site-packages, where no package can put them."""

    def get_source_files(self) -> list[str]:
        return list(START_UP)

    def run(self) -> None:
        # An editable wheel holds no build_lib; what should be in it is "installed" into its folder.
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(root)
        for file in START_UP:
            self.copy_file(file, str(Path(root, Path(file).name)))


class BuildNative(_BuildCommand):
    """The library behind the native backend. It knows nothing of Python, so it is no extension module.

    Without a compiler the package is installed all the same, and computes with torch's own operations.
    """

    def get_source_files(self) -> list[str]:
        return [str(file) for file in sorted(C_SOURCES.glob("*.[ch]"))]

    def run(self) -> None:
        target = LIBRARY if self.editable_mode else Path(self.build_lib, LIBRARY)
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                # Moved, not written in place: programs that have the old one loaded go on with it.
                shutil.move(self.link(Path(folder)), target)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"the C library of the selective scan was not built ({error}); scans on CPUs will be many times "
                f"slower. Install a C compiler (gcc or clang), or name one in CC, and install again."
            )

    def compile(self, source: str, flags: str, target: Path, optional: bool = False) -> str:
        """Compile; return the first line of what the compiler says if it fails, and may."""
        command = [*_compiler(), *shlex.split(C_FLAGS), *shlex.split(flags), *shlex.split(os.environ.get("CFLAGS", ""))]
        command += ["-c", str(C_SOURCES / source), "-o", str(target)]
        done = subprocess.run(command, check=not optional, stderr=subprocess.PIPE if optional else None, text=True)
        return "" if done.returncode == 0 else next(iter(done.stderr.splitlines()), f"exit status {done.returncode}")

    def link(self, folder: Path) -> Path:
        kernels = [
            (name, f"{flags} -DSUFFIX={name} {precision}", source, folder / f"{source}{name}{precision}.o")
            for name, flags in INSTRUCTION_SETS.items()
            for precision in ("", "-DDOUBLE")
            for source in ("scan_kernel.c", "conv_kernel.c", "mamba_kernel.c")
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(lambda k: self.compile(k[2], k[1], k[3], optional=k[0] != "baseline"), kernels))
        missing = {kernel[0]: reason for kernel, reason in zip(kernels, said, strict=True) if reason}
        if platform.machine() in ("x86_64", "AMD64"):
            for name, reason in missing.items():
                self.warn(
                    f"the C library has no {name} kernels, and is slower on processors that could run them: "
                    f"{' '.join(_compiler())} does not compile them ({reason}). A newer gcc or clang does."
                )
        objects = [kernel[3] for kernel in kernels if kernel[0] not in missing]
        sets = " ".join(f"-DLN_{name.upper()}" for name in INSTRUCTION_SETS if name not in missing)
        for source in ("dispatch.c", "threads.c", "memory.c"):
            objects.append(folder / f"{source}.o")
            self.compile(source, sets, objects[-1])
        library = folder / LIBRARY.name
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        subprocess.run([*_compiler(), "-shared", *flags, "-o", library, *objects, "-lpthread"], check=True)
        return library


def _compiler() -> list[str]:
    """CC, or else the first that is there of Python's own compiler and the usual names."""
    if "CC" in os.environ:
        return shlex.split(os.environ["CC"])
    for command in (sysconfig.get_config_var("CC") or "", "cc", "gcc", "clang"):
        if command and shutil.which(shlex.split(command)[0]):
            # Python's own compiler may come with options for its platform, such as -arch.
            return [*shlex.split(command), *shlex.split(os.environ.get("ARCHFLAGS", ""))]
    raise FileNotFoundError("no C compiler: neither CC nor cc, gcc or clang was found")


class BdistWheel(bdist_wheel):
    """A wheel with the library is for one platform and any Python; one without it is for any platform."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not Path(self.get_finalized_command("build_native").build_lib, LIBRARY).is_file()
        # Without this setuptools would take all modules for platform-independent, and put them beside the root.
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


build.sub_commands += [("build_start_up", None), ("build_native", None)]
setup(cmdclass={"build_start_up": BuildStartUp, "build_native": BuildNative, "bdist_wheel": BdistWheel})
