"""A running triton_worker.py, or another such script, and how tests talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class TritonProcess:
    """Sends requests to a worker process and waits for the answers.

    Args:
        folder: Where it runs and, unless it interprets, caches compiled kernels.
        interpret: Whether Triton interprets kernels instead of compiling them.
        hide_gpus: Whether torch sees no GPU.
        worker: The script it runs, beside this one.
        triton: Folder of the Triton to use, if it is not the installed one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interpret: bool,
        hide_gpus: bool = False,
        worker: str = "triton_worker.py",
        triton: Path | None = None,
    ) -> None:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": str(int(interpret))}
        if triton is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(triton), os.environ.get("PYTHONPATH"))))
        if hide_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._log = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=environment,
        )

    def __call__(self, function: str, **arguments: Any) -> Any:
        """The result of one of the worker's functions."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"function": function, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise AssertionError(self._log.read())
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
