"""`--vm-sit`: a failure stops the run, with a shell in the guest and a Python prompt.

The shell is the one of `vmlab shell`, on the machine's virtio console; the prompt has the test's
fixtures by their names. Leaving both lets the run go on.
"""

from __future__ import annotations

import asyncio
import code
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from vmlab.lab.session import Session
from vmlab.lab.terminal import on_terminal, run_on_terminal
from vmlab.machine.errors import VmlabError
from vmlab.pytest_plugin.deaths import shown

if TYPE_CHECKING:
    import pytest

    from vmlab.lab.vm import VM
    from vmlab.pytest_plugin.trial import Trial

_SHELL: Final = ("sh", "-c", "command -v bash >/dev/null && exec bash -l; exec sh -l")


def sit(item: pytest.Item, trial: Trial, report: pytest.TestReport) -> None:
    """Hand the terminal to whoever sits there, until they have seen enough."""
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend(in_=True)
    try:
        _sit(item, trial, report)
    finally:
        if capture is not None:
            capture.resume()


def _sit(item: pytest.Item, trial: Trial, report: pytest.TestReport) -> None:
    print(f"\n{item.nodeid} failed at {report.when}:\n{report.longreprtext}\n", flush=True)
    alive = [vm for vm in trial.machines.values() if vm.alive and vm.guest is not None]
    if alive and on_terminal():
        shell(alive[0])

    names: dict[str, Any] = dict(getattr(item, "funcargs", {}))
    names |= {name: vm for name, vm in trial.machines.items() if name.isidentifier()}
    names["shell"] = shell
    machines = ", ".join(trial.machines) or "none"
    banner = (
        f"Python {sys.version.split()[0]}; the test's names: {', '.join(sorted(names))}\n"
        f"machines: {machines}. shell(vm) opens a shell in a guest; Ctrl-D lets the run go on."
    )
    console = code.InteractiveConsole(names)
    console.interact(banner=banner, exitmsg="")


def shell(vm: VM) -> int | None:
    """A shell in a machine's guest on this terminal; returns its exit status."""
    if vm.guest is None:
        print(f"{vm!r} has no guest that answers: shell({vm.name}) needs one")
        return None
    print(f"a shell in {vm.name}; `exit` or Ctrl-D leaves it", flush=True)
    session = Session(vm.machine, vm.guest)
    try:
        with _Resizes().following() as resizing:
            return vm.run(run_on_terminal(session, _SHELL, resizing=resizing))
    except VmlabError as error:
        print(shown(error))
        return None


class _Resizes:
    """Tells a coroutine in the lab's thread of a window's new size.

    Signals are the main thread's, which waits for the coroutine meanwhile; the handler passes them.
    """

    def __init__(self) -> None:
        self._tell: Callable[[], object] | None = None

    @contextmanager
    def following(self) -> Iterator[Callable[[Callable[[], None]], AbstractContextManager[None]]]:
        """While it is entered, changes are passed on to who asks for them."""
        before = signal.signal(signal.SIGWINCH, lambda number, frame: self._changed())
        try:
            yield self._resizing
        finally:
            signal.signal(signal.SIGWINCH, before)

    def _changed(self) -> None:
        if self._tell is not None:
            self._tell()

    @contextmanager
    def _resizing(self, changed: Callable[[], None]) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        self._tell = lambda: loop.call_soon_threadsafe(changed)
        try:
            yield
        finally:
            self._tell = None
