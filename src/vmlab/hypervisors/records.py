"""The records of an owner's machines: a directory, a document and a lock for each.

What a hypervisor has to know to find a machine again is in its document; what it means is the
hypervisor's own affair.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.machine.errors import MachineNotFound, OperationFailed
from vmlab.report import write_atomically

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

__all__ = [
    "FILE_NAME",
    "LOCK",
    "MachineRecords",
    "read_document",
    "runtime_name",
    "write_document",
]

FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of stores and ids of machines, which become names of files."""

LOCK: Final = "lock"
"""Name of the lock file of an owner's or a machine's directory."""


def runtime_name(token: str) -> str:
    """The name of the directory of sockets that an owner with a long path has elsewhere."""
    return f"vmlab-{token}"


def write_document(path: Path, data: Mapping[str, Any]) -> None:
    """Write a small document whole; it need not survive the host, since what it tells does not."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    part.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    part.replace(path)


def read_document(path: Path) -> dict[str, Any]:
    """The document in that file.

    Raises:
        OSError, ValueError: there is none, or none that can be read.
    """
    data = json.loads(path.read_text("utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


class MachineRecords:
    """An owner's machines of one hypervisor, as files: a directory, a record and a lock for each.

    A machine's record says all that the next process needs to find the machine again.
    """

    def __init__(self, owner: Owner, hypervisor: str) -> None:
        self.owner = owner
        self.hypervisor = hypervisor
        self._root = owner.directory / "machines" / hypervisor

    def directory(self, machine: str) -> Path:
        """The directory of the machine with that id; nothing is made.

        Raises:
            ValueError: the id is not fit for a file's name.
        """
        if not FILE_NAME.fullmatch(machine):
            raise ValueError(f"{machine!r} is no id of a machine")
        return self._root / machine

    def create(self, machine: str) -> Path:
        """Make the machine's directory (mode 0700) and return it.

        Raises:
            FileExistsError: there is one already.
        """
        directory = self.directory(machine)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
        return directory

    def save(self, machine: str, record: Mapping[str, Any]) -> None:
        """Write the machine's record whole: a reader sees the old one or the new.

        Args:
            machine: Its id; `create` has made its directory.
            record: What JSON can hold.

        Raises:
            VmlabError: it cannot be written; the old one is untouched.
        """
        path = self.directory(machine) / "machine.json"
        if self.owner.kind == "store":
            write_atomically(path, json.dumps(record, indent=1).encode())
        else:
            write_document(path, record)

    def load(self, machine: str) -> dict[str, Any]:
        """The machine's record.

        Raises:
            MachineNotFound: there is no such machine.
            OperationFailed: its record is damaged.
        """
        path = self.directory(machine) / "machine.json"
        try:
            return read_document(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.gone(machine) from error
        except (OSError, ValueError) as error:
            raise OperationFailed(
                f"the record {path} cannot be read: {error}",
                hint="delete the machine, or put the file in order",
                machine=machine,
                hypervisor=self.hypervisor,
            ) from error

    def gone(self, machine: str) -> MachineNotFound:
        """The error for a machine that has no directory or no record."""
        return MachineNotFound(
            f"{self.owner} has no machine with the id {machine!r}",
            hint="it was deleted meanwhile, or never finished",
            machine=machine,
            hypervisor=self.hypervisor,
        )

    def ids(self) -> list[str]:
        """The ids of the machines that have a record."""
        try:
            found = sorted(self._root.iterdir())
        except OSError:
            return []
        return [path.name for path in found if (path / "machine.json").exists()]

    def remove(self, machine: str) -> None:
        """Remove the machine's directory with all that is in it; again does nothing.

        The record goes first, so that a machine half removed is none.
        """
        directory = self.directory(machine)
        with suppress(FileNotFoundError, NotADirectoryError):
            (directory / "machine.json").unlink()
        with suppress(FileNotFoundError):
            shutil.rmtree(directory)
