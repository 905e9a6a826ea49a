"""What pyproject.toml cannot say: start-up files go to the root of site-packages, in wheels and editable installs."""

from __future__ import annotations

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

START_UP = ("start_up/nnunetv2_lightnets.pth", "start_up/nnunetv2_lightnets.start")


class BuildStartUp(Command):
    """Python reads ``.pth`` and ``.start`` files only at the root of site-packages, where no package can put them."""

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def get_source_files(self) -> list[str]:
        return list(START_UP)

    def get_outputs(self) -> list[str]:
        return []  # nothing that an editable install should map back to the source

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def run(self) -> None:
        # An editable wheel holds no build_lib; what should be in it is "installed" into its folder.
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(root)
        for file in START_UP:
            self.copy_file(file, str(Path(root, Path(file).name)))


build.sub_commands.append(("build_start_up", None))
setup(cmdclass={"build_start_up": BuildStartUp})
