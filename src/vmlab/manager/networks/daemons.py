"""Programs that serve a network, each from one file: they live on while no manager runs.

A daemon is recorded before its program begins (`vmlab.hypervisors.processes`), and found again by
that. The name of its file has a digest of what is in it, so its command line tells what it was
told: one that was told something else is replaced, unless it looks at its file again by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.processes import OwnedProcess, adopt, spawn
from vmlab.machine.errors import OperationFailed
from vmlab.report import write_atomically

__all__ = ["Daemon"]

_READY_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.05
_EXCERPT: Final = 2000


class Daemon:
    """One program that serves a network.

    Args:
        directory: Of the network; its files and the record of its process are in it.
        name: Of the program, in file names.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.log = directory / f"{name}.log"
        # Not the machines' store: who looks for processes of machines does not find these.
        self._owner = Owner("store", f"network-{directory.name[:12]}", directory)

    def running(self) -> OwnedProcess | None:
        """Its process, if it runs."""
        return next((each for each in self._processes()), None)

    def pids(self) -> list[int]:
        """The numbers of its processes."""
        return [each.pid for each in self._processes()]

    async def keep(
        self,
        text: str,
        argv: Callable[[Path], Sequence[str | Path]],
        *,
        ready: str,
        rereads: bool = False,
    ) -> bool:
        """Have it run with a file of that text; one that runs with it already stays as it is.

        Args:
            text: What it is told.
            argv: Its command line, from the path of that file, which has to stand in it.
            ready: A regular expression: what it has written once it serves.
            rereads: Whether it looks at the file again by itself when that is replaced.

        Returns:
            Whether it was started.

        Raises:
            OperationFailed: it cannot be started, or ends by itself, with what it said.
        """
        told = "told" if rereads else hashlib.sha256(text.encode()).hexdigest()[:16]
        path = self.directory / f"{self.name}-{told}.conf"
        found = self._processes()
        if len(found) == 1 and any(str(path) in word for word in found[0].argv):
            if rereads and path.read_bytes() != text.encode():
                write_atomically(path, text.encode())
            return False
        await self.end()
        write_atomically(path, text.encode())
        self.log.unlink(missing_ok=True)
        process = await spawn(
            argv(path), owner=self._owner, stdout=self.log, stderr=self.log, cwd=self.directory
        )
        await self._until_ready(process, re.compile(ready.encode()))
        return True

    async def end(self) -> None:
        """End it, and remove what it was told; again does nothing."""
        for process in self._processes():
            await process.end()
        for path in self.directory.glob(f"{self.name}-*"):
            path.unlink(missing_ok=True)

    def _processes(self) -> list[OwnedProcess]:
        mark = f"/{self.name}-"
        return [each for each in adopt(self._owner) if any(mark in word for word in each.argv)]

    async def _until_ready(self, process: OwnedProcess, ready: re.Pattern[bytes]) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            ended = not process.running
            said = self._said()
            if not ended and ready.search(said):
                return
            if ended or time.monotonic() > deadline:
                if not ended:
                    await process.end()
                excerpt = said[-_EXCERPT:].decode(errors="replace").strip()
                raise OperationFailed(
                    f"{Path(process.argv[0]).name} "
                    + ("ended" if ended else f"did not serve within {_READY_SECONDS:g} s")
                    + (f": {excerpt}" if excerpt else " and said nothing"),
                    hint=f"its log is {self.log}",
                )
            await asyncio.sleep(_LOOK_SECONDS)

    def _said(self) -> bytes:
        try:
            return self.log.read_bytes()
        except FileNotFoundError:
            return b""
