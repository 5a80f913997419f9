"""The engine process: one machine, its monitor, and the thread that owns both.

The process ends when it is told to (`quit`, SIGTERM, SIGINT) and when the guest powers off, unless
it is to stay for that. A guest that cannot go on is kept, standing, for whoever wants to look.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from vmlab.engine.configuration import Configuration
from vmlab.engine.control import VERSION, Control
from vmlab.engine.debug.commands import DebugCommands
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.fault_commands import FaultCommands
from vmlab.engine.machine import Happening, Machine
from vmlab.engine.monitor.server import Monitor
from vmlab.engine.qapi import Cause, Panicked, RunState, Shutdown

if TYPE_CHECKING:
    from vmlab.engine.debug.gdbstub import GdbServer

EXIT_FAILED: Final = 1
"""Status of a process whose machine failed; 0 is a power-off or an order to quit."""

SWITCH_SECONDS: Final = 0.0003
"""How long a thread may hold the interpreter's lock when another wants it: a pause takes up to
three such handovers, and is to reach every hart within 2 ms."""


class Process:
    """Serves one machine until it ends.

    Args:
        configuration: The machine.

    Raises:
        VmlabError: the machine cannot be built.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._cause: Cause | None = None
        self._guest = False
        self._status = 0
        self._no_reboot = configuration.no_reboot
        self._no_shutdown = configuration.no_shutdown
        self._paused = configuration.paused
        self._reactor = Reactor(self._mistaken)
        self._machine = Machine(configuration, self._reactor, self._happened)
        try:
            self._control = Control(self._machine, self._quit)
            self._monitor = Monitor(
                Path(configuration.qmp),
                self._reactor,
                self._control.commands,
                VERSION,
                self._work.put,
            )
            self._gdb = self._debugged(configuration)
        except BaseException:
            self._machine.close()
            self._reactor.close()
            raise
        self._control.emit = self._monitor.emit

    def _debugged(self, configuration: Configuration) -> GdbServer | None:
        """What a debugger comes to, if one may."""
        control = self._control
        DebugCommands(control, self._work.put)
        FaultCommands(self._machine, control.commands)
        self._machine.harts.halted = lambda stop: self._work.put(lambda: control.trapped(stop))
        if configuration.gdb is None:
            return None
        from vmlab.engine.debug.gdbstub import GdbServer

        return GdbServer(Path(configuration.gdb.socket), self._reactor, control, self._work.put)

    def run(self) -> int:
        """Serve until the end; the status that the process is to end with."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self._reactor.start()
        if not self._paused:
            self._control.cont()
        # What was made so far lives as long as the process.
        gc.freeze()
        gc.enable()
        while self._cause is None:
            self._work.get()()
        self._monitor.emit("SHUTDOWN", Shutdown(guest=self._guest, reason=self._cause))
        # The answer to `quit` is sent before the socket closes.
        while True:
            try:
                self._work.get_nowait()()
            except queue.Empty:
                break
        self._monitor.close()
        if self._gdb is not None:
            self._gdb.close()
        self._machine.close()
        self._reactor.close()
        return self._status

    # ------------------------------------------------------------------------ from any thread

    def _happened(self, what: Happening, reason: str) -> None:
        self._work.put(lambda: self._look(what, reason))

    def _mistaken(self, error: BaseException) -> None:
        """Something of the process's own raised: it must not go on as if nothing were."""

        def end() -> None:
            raise error

        self._work.put(end)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._work.put(lambda: self._quit(Cause.HOST_SIGNAL))

    # ------------------------------------------------------------------- on the owner's thread

    def _quit(self, cause: Cause) -> None:
        self._cause = self._cause or cause

    def _look(self, what: Happening, reason: str) -> None:
        """Do what follows from what the machine tells."""
        print(f"{what.value}: {reason}", file=sys.stderr, flush=True)
        control = self._control
        if what is Happening.REBOOT and not self._no_reboot:
            control.reset(Shutdown(guest=True, reason=Cause.GUEST_RESET))
            return
        control.stand()
        if what is Happening.FAILED:
            control.status = RunState.INTERNAL_ERROR
            self._status = EXIT_FAILED
            control.emit("GUEST_PANICKED", Panicked("pause", reason))
            control.emit("STOP", None)
            return
        control.status = RunState.SHUTDOWN
        cause = Cause.GUEST_SHUTDOWN if what is Happening.POWEROFF else Cause.GUEST_RESET
        if self._no_shutdown:
            control.emit("SHUTDOWN", Shutdown(guest=True, reason=cause))
            control.emit("STOP", None)
            return
        self._guest = True
        self._quit(cause)


def serve(configuration: Configuration) -> int:
    """Run a machine in this process; the status to end with."""
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_SECONDS)
    return Process(configuration).run()
