"""The journal of a store: each simulated machine in a file, so that it outlives the process.

A file is replaced as a whole and before anybody is told that something was done, so that a
`kill -9` at any moment leaves the last state that anybody knows of. It is not made for power cuts
of the real host: nothing is fsynced.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout
from pydantic import ValidationError

from vmlab.hypervisors.simulated.hardware import Hardware
from vmlab.hypervisors.simulated.records import MachineRecord
from vmlab.machine.errors import HypervisorUnavailable

_SUFFIX: Final = ".machine.json"


class Journal:
    """The machines of one store, on disk.

    Args:
        directory: Of these machines alone; it is made when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = FileLock(directory / "lock", mode=0o600)

    def open(self) -> None:
        """Make the directory and take it for this process.

        Raises:
            HypervisorUnavailable: another process has it, or it cannot be written.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise HypervisorUnavailable(
                f"{self.directory} is in use by another process",
                hint="use that one (`vmlab simulate` serves many clients), or another store",
                hypervisor="simulated",
            ) from None
        except OSError as error:
            raise HypervisorUnavailable(
                f"{self.directory} cannot be written: {error.strerror}",
                hint="give a directory of your own",
                hypervisor="simulated",
            ) from error

    def close(self) -> None:
        """Let go of the directory; closing it again does nothing."""
        self._lock.release()

    def save(self, hardware: Hardware) -> None:
        """Keep a machine as it is now."""
        path = self._path(hardware.id)
        scratch = path.with_suffix(".new")
        scratch.write_text(MachineRecord.of(hardware).model_dump_json(), encoding="utf-8")
        scratch.replace(path)

    def remove(self, id_: str) -> None:
        """Forget a machine."""
        self._path(id_).unlink(missing_ok=True)

    def load(self) -> Iterator[MachineRecord]:
        """The machines that were kept, by name.

        Raises:
            HypervisorUnavailable: one of the files is not what was written.
        """
        records = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            try:
                records.append(MachineRecord.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError) as error:
                raise HypervisorUnavailable(
                    f"{path} is damaged: {str(error).splitlines()[0]}",
                    hint="move the file away: the machine in it is lost, the others are not",
                    hypervisor="simulated",
                ) from error
        return iter(sorted(records, key=lambda record: record.spec.name))

    def _path(self, id_: str) -> Path:
        return self.directory / f"{id_}{_SUFFIX}"
