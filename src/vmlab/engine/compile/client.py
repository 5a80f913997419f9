"""The engine's side of the compile worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vmlab.engine.compile.worker import read_message, write_message
from vmlab.machine.errors import VmlabError


class CompileFailed(VmlabError):
    """Native code could not be made."""


class CompileWorker:
    """A worker process; it ends with this object, or with this process.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vmlab.engine.compile.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def interpreter(self, without: Sequence[str] = ()) -> bytes:
        """The object of the riscv64 interpreter.

        Args:
            without: Features that are not to be used although the processor has them, in the
                names of LLVM.

        Raises:
            CompileFailed: the worker died, or said why it cannot.
        """
        return self._ask({"interpreter": "riscv64", "without": list(without)})

    def module(self, text: str, *, optimize: int) -> bytes:
        """The object of a module in LLVM IR; raises as `interpreter` does."""
        return self._ask({"module": text, "optimize": optimize})

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:  # it is gone already
            pass
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, str | int | list[str]]) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            write_message(self._process.stdin, json.dumps(request).encode())
            answer = read_message(self._process.stdout)
        except (BrokenPipeError, EOFError):
            answer = None
        if not answer:
            status = self._process.wait()
            raise CompileFailed(
                f"the compile worker died with status {status}",
                hint="its own message stands above; llvmlite may be missing or broken",
            )
        if answer[0]:
            raise CompileFailed(
                f"native code could not be generated: {answer[1:].decode(errors='replace')}",
                hint="this is a mistake in vmlab; please report it with the command that you ran",
            )
        return answer[1:]
