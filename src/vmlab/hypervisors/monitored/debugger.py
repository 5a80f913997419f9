"""Where a debugger comes to a machine that waits for it: the option `gdb` of a hypervisor."""

from __future__ import annotations

import os
from pathlib import Path

from vmlab.hypervisors.ownership import SOCKET_PATH_LIMIT
from vmlab.machine.errors import InvalidSpec, SpecProblem


def debugger_socket(value: str, hypervisor: str) -> Path:
    """The path of a socket that the machine's process and gdb can both name.

    Raises:
        InvalidSpec: it is relative, or too long for a socket.
    """
    if not value.startswith("/") or len(os.fsencode(value)) > SOCKET_PATH_LIMIT:
        wanted = f"an absolute path of at most {SOCKET_PATH_LIMIT} bytes for a Unix socket"
        raise InvalidSpec([SpecProblem("gdb", value, wanted)], hypervisor=hypervisor)
    return Path(value)
