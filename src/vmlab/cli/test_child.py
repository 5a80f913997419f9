"""pytest in a process of its own, for `vmlab test`: its streams, its events, its end.

A process of its own has the memory, the imports and the standard streams to itself, whatever the
tests do to them. It dies with this one, and is told by SIGINT to clear up when this one is.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import IO, Any, Final

from vmlab.hypervisors.processes import die_with_parent
from vmlab.pytest_plugin.wire import DESCRIPTOR, PLUGIN, PLUGINS_BEFORE

_TURN: Final = 0.2
"""Seconds after which somebody looks at the journals, also when nothing was told."""

_DRAIN: Final = 1 << 16
_PATIENCE: Final = 3
"""How often one has to ask it to end until it is ended."""

Event = Mapping[str, Any]


class PytestChild:
    """pytest with some arguments.

    Args:
        arguments: As on its command line.
        on_event: Told of each event (`vmlab.pytest_plugin.telling`).
        on_output: Given what it prints on stdout and on stderr.
        on_turn: Called a few times a second.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        on_event: Callable[[Event], None],
        on_output: Callable[[str, bytes], None],
        on_turn: Callable[[], None],
    ) -> None:
        self.arguments = list(arguments)
        self.interrupted: int | None = None
        self._on_event = on_event
        self._on_output = on_output
        self._on_turn = on_turn
        self._asked = 0
        self._early = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run it to its end; its exit status, negative for a signal."""
        with self._signals():
            return self._run()

    def _run(self) -> int:
        listening, telling = os.pipe()
        try:
            # In a session of its own: Ctrl-C reaches this process alone, which passes it on once.
            self._process = process = subprocess.Popen(
                command(self.arguments),
                env=_environment(telling),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(telling,),
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  # no thread yet
            )
        finally:
            os.close(telling)
        if self._early:
            process.send_signal(signal.SIGINT)
        with os.fdopen(listening, "rb", buffering=0) as events, process:
            assert process.stdout is not None
            assert process.stderr is not None
            self._attend(process, events, {"stdout": process.stdout, "stderr": process.stderr})
            return process.wait()

    def _attend(
        self, process: subprocess.Popen[bytes], events: IO[bytes], streams: dict[str, IO[bytes]]
    ) -> None:
        """Listen until it has ended, and what it has said is heard."""
        held = b""
        with selectors.DefaultSelector() as selector:
            selector.register(events, selectors.EVENT_READ, "events")
            for name, stream in streams.items():
                selector.register(stream, selectors.EVENT_READ, name)
            while selector.get_map():
                # Somebody who outlives it may hold its streams: they are not waited for.
                over = process.poll() is not None
                ready = selector.select(0 if over else _TURN)
                for key, _ in ready:
                    data = os.read(key.fd, _DRAIN)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "events":
                        *lines, held = (held + data).split(b"\n")
                        for line in lines:
                            self._on_event(json.loads(line))
                    else:
                        self._on_output(key.data, data)
                self._on_turn()
                if over and not ready:
                    break

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals that end this process are passed on meanwhile, as Ctrl-C."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._arrived) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        process = self._process
        self.interrupted = self.interrupted or number
        self._asked += 1
        if process is None:
            # It is just being started, and is told then.
            self._early = True
        elif process.poll() is None:
            process.send_signal(signal.SIGKILL if self._asked >= _PATIENCE else signal.SIGINT)


def run_in_foreground(arguments: Sequence[str]) -> tuple[int, int | None]:
    """pytest with the terminal to itself, for people who talk to it: to pdb, to a guest's shell.

    Returns:
        Its exit status, and the signal that this process was told to end by, if it was.
    """
    got: list[int] = []
    process: subprocess.Popen[bytes] | None = None
    early = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal early
        got.append(number)
        # Ctrl-C at a terminal has reached it already.
        if number == signal.SIGINT and sys.stdin.isatty():
            return
        if process is None:
            # It is just being started, and is told then.
            early = True
        else:
            process.send_signal(signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        process = subprocess.Popen(
            command(arguments),
            env=_environment(),
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  # no thread yet
        )
        if early:
            process.send_signal(signal.SIGINT)
        return process.wait(), got[0] if got else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of pytest itself, without the working directory on its path."""
    return [sys.executable, "-P", "-m", "pytest", *arguments]


def _environment(descriptor: int | None = None) -> dict[str, str]:
    """What pytest is told beside its arguments: whose it is, and where to tell what it does."""
    before = os.environ.get("PYTEST_PLUGINS", "")
    told = {} if descriptor is None else {DESCRIPTOR: str(descriptor)}
    return {
        **os.environ,
        "PYTEST_PLUGINS": f"{before},{PLUGIN}" if before else PLUGIN,
        PLUGINS_BEFORE: before,
        **told,
    }
