"""nnU-Net's commands without the ten seconds of imports before each: a process that has imported all, and forks.

Every command is a process of its own, with its own arguments, environment, output and exit code, and runs the entry
point that the installed script of that name runs. Two things differ from the script: modules are imported before, and
nnU-Net's worker processes are forked, not spawned (a spawned one imports all again). ``Commands(warm=False)`` runs the
installed scripts themselves.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDERS = ("raw", "preprocessed", "results")
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code, and what it wrote."""

    code: int
    stdout: str
    stderr: str


class Commands:
    """nnU-Net's commands in three data folders under ``folder``.

    Args:
        folder: where raw, preprocessed and results are, and logs of all commands.
        threads: threads of each command.
        warm: fork a prepared process (True), or run the installed scripts (False).

    Attributes:
        raw, preprocessed, results: nnU-Net's data folders.
    """

    def __init__(self, folder: Path, *, threads: int = 1, warm: bool = True) -> None:
        self.folder, self.threads, self.warm = folder, threads, warm
        self.raw, self.preprocessed, self.results = (folder / name for name in FOLDERS)
        for name in (*FOLDERS, "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._server: subprocess.Popen[str] | None = None
        self._number = len(list((folder / "logs").iterdir()))

    @property
    def environment(self) -> dict[str, str]:
        """Of every command: the folders, and few processes. No nnUNet_extTrainer: trainers are found without it."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        return (
            kept
            | {f"nnUNet_{name}": str(self.folder / name) for name in FOLDERS}
            | {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": str(self.threads)}
        )

    def run(
        self,
        command: str,
        *arguments: str | Path,
        warm: bool | None = None,
        interrupt_at: Path | None = None,
        bin_folder: Path | None = None,
        **environment: str,
    ) -> Done:
        """Run one command to its end.

        Args:
            command: its name, e.g. "nnUNetv2_train".
            *arguments: as typed.
            warm: overrules the warmth of these commands.
            interrupt_at: a file at whose appearance the command gets what Ctrl-C sends.
            bin_folder: folder with the installed scripts (default: beside this Python); not for warm commands.
            **environment: additional variables.
        """
        self._number += 1
        log = self.folder / "logs" / f"{self._number:04d}_{command}"
        words = [str(word) for word in arguments]
        log.with_suffix(".cmd").write_text(" ".join([command, *words]) + "\n")
        out, err = log.with_suffix(".out"), log.with_suffix(".err")
        if self.warm if warm is None else warm:
            code = self._run_forked(command, words, environment, out, err, interrupt_at)
        else:
            program = (bin_folder or Path(sys.executable).parent) / command
            with open(out, "w") as stdout, open(err, "w") as stderr:
                process = subprocess.Popen(
                    [str(program), *words],
                    env=self.environment | environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                )
                if interrupt_at is not None:
                    _interrupt_when_there(process.pid, interrupt_at, lambda: process.poll() is not None)
                code = process.wait()
        return Done(code, out.read_text(errors="replace"), err.read_text(errors="replace"))

    def must(self, command: str, *arguments: str | Path) -> Done:
        """Run a command that has no reason to fail.

        Raises:
            RuntimeError: if it does, with the end of what it wrote.
        """
        done = self.run(command, *arguments)
        if done.code != 0:
            words = " ".join(map(str, arguments))
            raise RuntimeError(f"{command} {words}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done

    def close(self) -> None:
        """End the prepared process."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()
            self._server = None

    def _run_forked(
        self,
        command: str,
        arguments: list[str],
        environment: dict[str, str],
        out: Path,
        err: Path,
        interrupt_at: Path | None,
    ) -> int:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(self.threads)],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        request = {
            "command": command,
            "arguments": arguments,
            # Training alone may load its data without another process: nnU-Net's planner refuses that.
            "environment": ({"nnUNet_n_proc_DA": "0"} if command == "nnUNetv2_train" else {}) | environment,
            "out": str(out),
            "err": str(err),
        }
        server.stdin.write(json.dumps(request) + "\n")
        pid = int(server.stdout.readline())
        ended = threading.Event()
        watcher = None
        if interrupt_at is not None:
            watcher = threading.Thread(target=_interrupt_when_there, args=(pid, interrupt_at, ended.is_set))
            watcher.start()
        code = int(server.stdout.readline())
        ended.set()
        if watcher is not None:
            watcher.join()
        return code


def _interrupt_when_there(pid: int, file: Path, ended: Any) -> None:
    while not file.exists():
        if ended():
            return
        time.sleep(_POLL_SECONDS)
    os.kill(pid, signal.SIGINT)


def _serve(threads: int) -> None:
    """Read requests from stdin until it ends; answer each with the process id, then the exit code."""
    entry_points = {
        point.name: point
        for point in importlib.metadata.entry_points(group="console_scripts")
        if point.name.startswith("nnUNetv2_") and point.value.startswith("nnunetv2.")
    }
    for point in entry_points.values():
        point.load()
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    # nnU-Net imports every trainer of its own before it looks for one of ours; stdout is for answers.
    sys.stdout, answers = sys.stderr, sys.stdout
    with open(os.devnull, "w") as sys.stdout:
        recursive_find_trainer_class_by_name("nnUNetTrainerLightMUNet")
    sys.stdout = answers

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run_entry_point(entry_points[request["command"]], request, threads)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run_entry_point(point: importlib.metadata.EntryPoint, request: dict[str, Any], threads: int) -> None:
    """What the installed script does, in this process, which ends with it."""
    for descriptor, file, mode in ((0, os.devnull, os.O_RDONLY), (1, request["out"], 577), (2, request["err"], 577)):
        opened = os.open(file, mode, 0o644)  # 577: O_WRONLY | O_CREAT | O_TRUNC
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.update(request["environment"])
    os.chdir("/")
    sys.argv = [str(Path(sys.executable).parent / point.name), *request["arguments"]]
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork")  # type: ignore[assignment]
    # nnU-Net gives torch all processors when it computes on them.
    multiprocessing.cpu_count = lambda: threads  # type: ignore[assignment]

    from nnunetv2_lightnets.discovery.command_line import report_errors_if_ours

    code: Any = 1
    try:
        report_errors_if_ours()  # a new Python would do this when it starts
        code = point.load()()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
