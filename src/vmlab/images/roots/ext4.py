"""An ext4 file system from a directory, as an ordinary user, the same bytes every time.

`mke2fs -d` copies the files; owners, modes, devices, times and extended attributes, which an
ordinary user cannot give to files on the host, are then written with debugfs.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from vmlab.images.errors import FormatError
from vmlab.images.formats.tarball import TarEntry
from vmlab.images.progress import Progress, silent, watched
from vmlab.images.roots import tools

LABEL = "vmlab-root"
_TYPES = {"file": 0o100000, "directory": 0o040000, "symlink": 0o120000, "character": 0o020000,
          "block": 0o060000, "fifo": 0o010000}  # fmt: skip
_NODES = {"character": "c", "block": "b", "fifo": "p"}
# A namespace of our own for the UUIDs of file systems: they follow from the image's digest.
_NAMESPACE = uuid.UUID("6b1ad6ea-2d6b-5f6b-9f0e-3f4f0d5f8a11")


def make(
    directory: Path,
    entries: Iterable[TarEntry],
    output: Path,
    *,
    size: int,
    seed: str,
    epoch: int,
    scratch: Path,
    progress: Progress = silent,
) -> None:
    """Write a file system image.

    Args:
        directory: The files' contents, as `tarball.extract` left them.
        entries: What the files are to be, in any order; the last one of a path counts.
        output: The image to write, sparse.
        size: Its size in bytes.
        seed: Decides UUID and hash seed.
        epoch: The time that every file has changed and was made, seconds since 1970.
        scratch: A directory for files of its own.
        progress: Told how much is written.

    Raises:
        ToolMissing: mke2fs or debugfs is not installed.
        BuildFailed: the files do not fit, or a tool failed.
        FormatError: an entry has a name that debugfs cannot be given.
    """
    found = tools.require(("mke2fs", "debugfs"), what="making a file system")
    wanted = {entry.path: entry for entry in entries}
    _settle_times(directory, wanted, epoch)
    with output.open("wb") as file:
        file.truncate(size)
    environment = {
        "E2FSPROGS_FAKE_TIME": str(epoch),  # before 1.47.1
        "SOURCE_DATE_EPOCH": str(epoch),  # since then
        "MKE2FS_DETERMINISTIC": "1",
    }
    held = _blocks(directory)
    with watched("writing the disk", progress, lambda: (output.stat().st_blocks * 512, held)):
        tools.run(
            [found["mke2fs"], "-q", "-F", "-t", "ext4",
             "-L", LABEL,
             "-U", str(uuid.uuid5(_NAMESPACE, seed)),
             "-E", f"hash_seed={uuid.uuid5(_NAMESPACE, seed + ':hash')},root_owner=0:0,"
                   "lazy_itable_init=0,lazy_journal_init=0",
             "-O", "^metadata_csum_seed,^orphan_file",
             "-m", "0",
             "-d", str(directory),
             str(output)],
            what="making the file system",
            log=scratch / "mke2fs.log",
            environment=environment,
        )  # fmt: skip
    commands = scratch / "debugfs.commands"
    with commands.open("w", encoding="utf-8", errors="surrogateescape") as script:
        for line in _commands(wanted.values(), epoch, scratch):
            script.write(line + "\n")
    log = scratch / "debugfs.log"
    size_of_commands = commands.stat().st_size
    with watched(
        "writing owners and modes",
        progress,
        lambda: (min(log.stat().st_size, size_of_commands), size_of_commands),  # it echoes them
    ):
        tools.run(
            [found["debugfs"], "-w", "-f", str(commands), str(output)],
            what="writing owners and modes", log=log, environment=environment,
        )  # fmt: skip
    _check(log)


def _blocks(directory: Path) -> int:
    """Bytes that a directory's files take in blocks of 4 KiB."""
    total = 0
    for folder, _, names in os.walk(directory):
        total += 4096
        for name in names:
            total += -(-os.lstat(f"{folder}/{name}").st_size // 4096) * 4096
    return total


def _settle_times(directory: Path, wanted: dict[str, TarEntry], epoch: int) -> None:
    """Give files on the host the times that mke2fs copies; directories last, deepest first."""
    for path in sorted(wanted, reverse=True):
        place = directory / path
        if wanted[path].kind in _NODES or not os.path.lexists(place):
            continue
        stamp = min(max(wanted[path].mtime, 0), epoch)
        os.utime(place, (stamp, stamp), follow_symlinks=False)
    for folder, _, _ in os.walk(directory, topdown=False):
        name = Path(folder).relative_to(directory).as_posix()
        entry = wanted.get(name)
        stamp = epoch if entry is None else min(max(entry.mtime, 0), epoch)
        os.utime(folder, (stamp, stamp))
        if entry is None and name != ".":  # a parent that the archive did not list
            wanted[name] = TarEntry(name, "directory", 0o755, 0, 0, epoch)
    wanted["."] = replace(wanted.get("", TarEntry("", "directory", 0o755, 0, 0, epoch)), path=".")
    wanted.pop("", None)
    wanted["lost+found"] = TarEntry("lost+found", "directory", 0o700, 0, 0, epoch)


def _commands(entries: Iterable[TarEntry], epoch: int, scratch: Path) -> Iterator[str]:
    """debugfs commands that make each inode what its entry says, debugfs(8)."""
    number = 0
    for entry in sorted(entries, key=lambda entry: entry.path):
        if entry.kind == "hardlink":
            continue  # the same inode as its target
        name = _quoted("/" + entry.path.removeprefix("."))
        if entry.kind in _NODES:
            folder, _, last = entry.path.rpartition("/")
            major, minor = entry.device
            numbers = f" {major} {minor}" if entry.kind != "fifo" else ""
            yield f"cd {_quoted('/' + folder)}"
            yield f"mknod {_quoted(last)} {_NODES[entry.kind]}{numbers}"
            yield "cd /"
        mode = _TYPES[entry.kind] | (0o777 if entry.kind == "symlink" else entry.mode)
        stamp = min(max(entry.mtime, 0), epoch)
        yield f"sif {name} mode 0{mode:o}"
        yield f"sif {name} uid {entry.uid}"
        yield f"sif {name} gid {entry.gid}"
        for field, value in (("ctime", epoch), ("crtime", epoch), ("mtime", stamp),
                             ("atime", stamp)):  # fmt: skip
            yield f"sif {name} {field} @{value}"
        for attribute, data in sorted(entry.xattrs.items()):
            number += 1
            file = scratch / f"xattr-{number}"
            file.write_bytes(data)
            yield f"ea_set -f {_quoted(str(file))} {name} {attribute}"


def _quoted(name: str) -> str:
    if '"' in name or "\n" in name:
        raise FormatError(f"the root has a file with the name {name!r}, which cannot be handled")
    return f'"{name}"'


def _check(log: Path) -> None:
    """debugfs ends with success whatever happened; what it printed beside its echo is trouble."""
    from vmlab.images.errors import BuildFailed

    wrong = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if not line.startswith(("debugfs", "Allocated inode"))
    ]
    if wrong:
        raise BuildFailed("writing owners and modes failed: " + "; ".join(wrong[:5]))
