"""The host's programs that full roots need: found before anything is started, or named.

Not a package manager: it says what to install, and installs nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from vmlab.images.errors import BuildFailed, ToolMissing

# Debian's packages; other distributions call most of them the same.
_PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "qemu-img": "qemu-utils",
    "unshare": "util-linux",
    "newuidmap": "uidmap",
}
_PLACES = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # not in an ordinary user's PATH
_LAST_LINES = 15


def find(name: str) -> str | None:
    """The path of a program, also where only root's PATH looks."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES))


def require(names: Iterable[str], *, what: str) -> dict[str, str]:
    """The paths of programs, by name.

    Raises:
        ToolMissing: naming all that are missing, and the packages that have them.
    """
    found = {name: find(name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        packages = sorted({_PACKAGES.get(name, "qemu-user-static") for name in missing})
        raise ToolMissing(
            f"{what} needs {', '.join(missing)}, which this host does not have",
            hint=f"install {' '.join(packages)}; the tiny images need none of them",
        )
    return {name: path for name, path in found.items() if path is not None}


def run(
    command: list[str],
    *,
    what: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    admit: Callable[[int], None] | None = None,
) -> None:
    """Run a program to its end; it dies with the thread that runs it.

    Args:
        command: The program and its arguments.
        what: What it is for, for errors.
        log: Where its output is collected.
        environment: Variables besides PATH and the locale; nothing else is passed on.
        admit: Told the process's id before it is told, by a line on its standard input, to go on.

    Raises:
        BuildFailed: it failed; its last lines are in the message.
    """
    variables = {"PATH": os.environ.get("PATH", "") + os.pathsep + os.pathsep.join(_PLACES),
                 "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", **(environment or {})}  # fmt: skip
    with log.open("ab") as output:
        # util-linux; the kernel ends the program when this thread ends, prctl(2) PR_SET_PDEATHSIG.
        setpriv = find("setpriv")
        guard = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv is not None else []
        process = subprocess.Popen(
            [*guard, *command], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            env=variables, start_new_session=True,
        )  # fmt: skip
        try:
            if admit is not None:
                admit(process.pid)
            with suppress(BrokenPipeError):  # it has ended already: its status tells why
                process.communicate(b"go\n" if admit is not None else None)
            status = process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            if process.stdin is not None:
                process.stdin.close()
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        raise BuildFailed(
            f"{what} failed: {Path(command[0]).name} ended with status {status}:\n"
            + "\n".join(f"    {line}" for line in lines)
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it started: they are a session of their own."""
    import signal

    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
