"""Compiled objects on disk: made once per source, processor and version, verified at each use.

A file is its content's digest and then the content. It comes into being by a rename, under a lock
that keeps two processes from compiling the same; one that does not verify is made anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import vmlab
from vmlab.engine.isa import __file__ as _isa_file

_DIGEST: Final = 32  # bytes of SHA-256
# What generated code depends on, as packages beside this one.
_SOURCES: Final = ("isa", "cpu", "compile")


def default_folder() -> Path:
    """Where the user's compiled objects are kept."""
    import platformdirs

    return platformdirs.user_cache_path("vmlab", appauthor=False) / "engine"


@cache
def _host() -> str:
    """This host's processor: what its code may be made for."""
    system = os.uname()
    lines = [system.sysname, system.machine]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # no Linux
        import platform  # which starts a process to know

        text = ""
        lines.append(platform.processor())
    for line in text.split("\n\n", 1)[0].splitlines():
        name = line.partition(":")[0].strip()
        if name in {"vendor_id", "cpu family", "model", "stepping", "flags", "Features"}:
            lines.append(line)
    return "\n".join(lines)


def _compiler() -> str:
    """What names the compiler's version, found without importing it or what knows of packages:
    every engine process asks, and importing importlib.metadata takes a tenth of its start."""
    found = find_spec("llvmlite")
    if found is None or found.origin is None:
        return ""
    try:
        return Path(found.origin).with_name("_version.py").read_text(encoding="utf-8")
    except OSError:
        return found.origin


@cache
def source_digest() -> str:
    """A digest of all code that generates code, and of the versions of what it uses."""
    digest = hashlib.sha256()
    engine = Path(_isa_file).parent.parent
    for package in _SOURCES:
        for path in sorted((engine / package).rglob("*.py")):
            digest.update(str(path.relative_to(engine)).encode() + b"\0" + path.read_bytes())
    for part in (vmlab.__version__, _compiler(), _host()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


class ObjectCache:
    """Objects by name.

    Args:
        folder: where they are; made when needed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def path(self, name: str) -> Path:
        """The file of an object, which may not exist."""
        key = hashlib.sha256(f"{name}\0{source_digest()}".encode()).hexdigest()
        return self.folder / f"{name}-{key[:32]}.o"

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """An object, made if it is not there or not whole.

        Where the folder cannot be written it is made each time.
        """
        path = self.path(name)
        found = _read(path)
        if found is not None:
            return found
        from filelock import FileLock

        lock = FileLock(path.with_suffix(".lock"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()
        except OSError:
            return make()
        try:
            found = _read(path)
            if found is None:
                found = make()
                with suppress(OSError):  # no space: it is made again the next time
                    _write(path, found)
            return found
        finally:
            lock.release()


def _read(path: Path) -> bytes | None:
    """The content of a file that verifies; None for any other."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[_DIGEST:]
    return content if hashlib.sha256(content).digest() == data[:_DIGEST] else None


def _write(path: Path, content: bytes) -> None:
    import tempfile  # which few starts need

    fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
