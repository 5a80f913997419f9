"""What the processes beside a QEMU have in common: a monitor, and a thread that does what is asked.

The other side is `companion`; the commands are those that a process adds.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.monitor.commands import Commands
from vmlab.engine.monitor.server import Monitor
from vmlab.machine.errors import VmlabError

_VERSION: Final = (0, 1, 0)


class ToldProcess:
    """A process that is told things, once it runs."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def later(self, work: Callable[[], None]) -> None:
        """Do something on the thread that runs; from any thread."""
        self._work.put(work)

    def run_until(self, over: Callable[[], bool], socket: Path, commands: Commands) -> None:
        """Do what is asked until it is over; then nobody is listened to any more.

        Args:
            over: Looked at after each thing that was done.
            socket: Where it is told; it must not exist.
            commands: What it can be told.

        Raises:
            VmlabError: the socket cannot be made.
        """
        reactor = Reactor(self._mistaken)
        monitor = Monitor(socket, reactor, commands, _VERSION, self._work.put)
        reactor.start()
        while not over():
            self._work.get()()
        monitor.close()
        reactor.close()

    def _mistaken(self, error: BaseException) -> None:
        def end() -> None:
            raise error

        self._work.put(end)


def main(arguments: list[str], serve: Callable[[str, Any], None]) -> int:
    """Serve what a file describes; the status to end with.

    Args:
        arguments: The name of the file.
        serve: Does it: given the name without its ending, and what the file describes.
    """
    os.umask(0o077)
    file = Path(arguments[0])
    try:
        serve(file.stem, json.loads(file.read_text("utf-8")))
    except VmlabError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0
