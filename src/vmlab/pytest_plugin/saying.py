"""What is told at once, whatever is captured: what tests wait for, and how far an image is.

A worker of pytest-xdist tells its controller, through a named pipe in the run's directory
(fifo(7)). Whoever owns the terminal then tells `vmlab test`, or says it in a line of pytest's.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.pytest_plugin.wire import NAME, PROGRESS, SAID

if TYPE_CHECKING:
    import pytest

    from vmlab.images import Progress
    from vmlab.images.progress import ProgressEvent
    from vmlab.pytest_plugin.workers import Worker

PIPE: Final = "said"
"""The pipe in the run's directory."""

_LOG: Final = logging.getLogger(__name__)
_LONGEST: Final = 1000
"""Characters of a text: a line of PIPE_BUF bytes (4096) gets into a pipe as a whole or not."""
_READ: Final = 1 << 16


def say(config: pytest.Config, worker: Worker | None, text: str) -> None:
    """Say in a sentence what a test waits for."""
    _LOG.warning("%s", text)
    _pass_on(config, worker, {"event": SAID, "text": text[:_LONGEST]})


def progress_of(config: pytest.Config, worker: Worker | None) -> Progress:
    """Tells whoever draws it how far the work on an image is."""

    def tell(event: ProgressEvent) -> None:
        facts = asdict(event) | {"step": event.step[:_LONGEST]}
        _pass_on(config, worker, {"event": PROGRESS, **facts})

    return tell


def _pass_on(config: pytest.Config, worker: Worker | None, message: Mapping[str, Any]) -> None:
    if worker is None:
        tell(config, message)
    elif (shared := worker.shared()) is not None:
        _write(shared.parent / PIPE, message)


def tell(config: pytest.Config, message: Mapping[str, Any]) -> None:
    """Tell it where the terminal is owned."""
    telling = config.pluginmanager.get_plugin(NAME)
    if telling is not None:
        telling.tell(**message)
    elif message["event"] == SAID:
        _print(config, str(message["text"]))


def _print(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if reporter is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            # pytest-xdist's dots are of no file: pytest does not know that its line has begun.
            line = "\n" if reporter._tw.width_of_current_line else ""
            reporter.write(f"{line}vmlab: {text}\n")


def _write(pipe: Path, message: Mapping[str, Any]) -> None:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return  # nobody listens any more; the log has it
    try:
        os.write(descriptor, json.dumps(message).encode() + b"\n")
    except (BlockingIOError, BrokenPipeError):
        return  # so much was said that this is not missed
    finally:
        os.close(descriptor)


class Listener:
    """In the controller: hears what workers tell, in a thread of its own.

    Args:
        pipe: Where; it is made.
        heard: Given each message, in the thread.
    """

    def __init__(self, pipe: Path, heard: Callable[[Mapping[str, Any]], None]) -> None:
        os.mkfifo(pipe, 0o600)
        # Open for writing as well, it never ends while workers come and go.
        self._descriptor = os.open(pipe, os.O_RDWR)
        self._heard = heard
        self._thread = threading.Thread(target=self._listen, name="vmlab-said", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        held = b""
        while True:
            *lines, held = (held + os.read(self._descriptor, _READ)).split(b"\n")
            for line in lines:
                if not line:
                    return
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # its writer was killed in the midst of it
                self._heard(message)

    def close(self) -> None:
        """Hear what was told until now, and no more."""
        # An empty line, also after one that is not whole: what was told before it is read first.
        os.write(self._descriptor, b"\n\n")
        self._thread.join()
        os.close(self._descriptor)
