"""A home's own manager, started when somebody needs it: a process that goes when nobody does.

Whoever finds nobody at its socket starts it; a lock makes it one, however many find so at once. Its
life is `vmlab.manager.service`; here is how it is begun, and how it is known who it is.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from vmlab.hypervisors.locks import locked_now
from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import from_record
from vmlab.manager.client.address import directory_of, socket_of
from vmlab.manager.client.replies import Unreachable

__all__ = ["LOG", "answers", "start"]

LOG: Final = "manager.log"
"""What it has to say."""

_PATIENCE: Final = 180.0
"""Seconds that somebody else's start of it is waited for."""
_EXCERPT: Final = 5
"""Lines of its log that an error quotes."""


def answers(path: Path) -> bool:
    """Whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def start(home: Home) -> None:
    """Have the home's manager run; returns when it answers.

    Raises:
        VmlabError: why it cannot.
        Unreachable: it ended, and said nothing.
    """
    path = socket_of(home)
    if answers(path):
        return
    directory = directory_of(home)
    with locked_now(directory / "start.lock", "the start of the manager", _PATIENCE):
        if not answers(path):
            _start(home, directory)


def _start(home: Home, directory: Path) -> None:
    done = subprocess.run(
        # -P: not what lies in whatever directory somebody happens to be in.
        [sys.executable, "-P", "-m", "vmlab.manager.service"],
        env={**os.environ, "VMLAB_HOME": str(home.directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        # Ctrl-C is for whoever asked; another one may need it as well.
        start_new_session=True,
        check=False,
    )
    if done.returncode == 0:
        return
    try:
        raise from_record(json.loads(done.stdout))
    except ValueError:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        words = "; ".join(said[-_EXCERPT:]) or f"status {done.returncode}"
        raise Unreachable(
            f"the manager of {home.directory} did not start: {words}",
            hint=f"{directory / LOG} tells more",
        ) from None
