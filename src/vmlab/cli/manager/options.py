"""Options and texts that several of the manager's commands have, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli.given import duration, wrong
from vmlab.cli.manager.completing import completed

if TYPE_CHECKING:
    from vmlab.manager.documents import MachineDocument

__all__ = [
    "MachineArgument",
    "MachinesArgument",
    "ago",
    "duration",
    "facts",
    "labels",
    "metadata",
    "moment",
    "nics",
    "policy",
    "wrong",
]

MachineArgument = Annotated[
    str, typer.Argument(help="Name or id of a machine.", autocompletion=completed("machines"))
]
MachinesArgument = Annotated[
    list[str], typer.Argument(help="Names or ids.", autocompletion=completed("machines"))
]


def moment(option: str, text: str | None, *, command: str) -> datetime | None:
    """When it is, that long from now.

    Raises:
        InvalidSpec: it is no time, or no calendar goes that far.
    """
    length = duration(option, text, command=command)
    try:
        return None if length is None else datetime.now(UTC) + length
    except OverflowError:
        raise wrong(option, text, "a time before the year 10000", command=command) from None


def labels(option: str, texts: Sequence[str] | None, *, command: str) -> dict[str, str]:
    """The labels of "key=value" texts; a key alone has an empty value."""
    found = {}
    for text in texts or ():
        key, _, value = text.partition("=")
        if not key:
            raise wrong(option, text, '"key=value"', command=command)
        found[key] = value
    return found


def nics(texts: Sequence[str] | None, *, command: str) -> list[dict[str, Any]]:
    """The interfaces of "NETWORK[,address=ADDRESS][,mac=MAC][,name=NAME]" texts."""
    found = []
    for text in texts or ():
        network, *rest = text.split(",")
        nic: dict[str, Any] = {"network": network}
        for part in rest:
            key, equals, value = part.partition("=")
            if not equals or key not in {"address", "mac", "name"}:
                expected = "NETWORK[,address=ADDRESS][,mac=MAC][,name=NAME]"
                raise wrong("--network", text, expected, command=command)
            nic[key] = value
        found.append(nic)
    return found


def policy(
    *,
    command: str,
    autostart: bool | None = None,
    fallback: Sequence[str] | None = None,
    release: str | None = None,
    findings: Sequence[str] | None = None,
    snapshot_every: str | None = None,
    snapshot_keep: int | None = None,
) -> dict[str, Any]:
    """What options say of a machine's policy; nothing of what they do not say."""
    every = duration("--snapshot-every", snapshot_every, command=command)
    said = {
        "autostart": autostart,
        "fallback": tuple(fallback) if fallback else None,
        "release_addresses": release,
        "findings": labels("--on", findings, command=command) or None,
        "snapshot_every": every,
        "snapshot_keep": snapshot_keep,
    }
    return {name: value for name, value in said.items() if value is not None}


def metadata(
    *,
    command: str,
    hostname: str | None = None,
    user_data: Path | None = None,
    ssh_keys: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """What options say of what a guest is told; files are read.

    Raises:
        InvalidSpec: a file cannot be read.
    """
    keys = [
        line
        for path in ssh_keys or ()
        for line in _text("--ssh-key", path, command).splitlines()
        if line.strip()
    ]
    said = {
        "hostname": hostname,
        "user_data": None if user_data is None else _text("--user-data", user_data, command),
        "ssh_keys": tuple(keys) or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _text(option: str, path: Path, command: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        expected = f"a file that can be read: {reason}"
        raise wrong(option, str(path), expected, command=command) from error


def facts(machine: MachineDocument) -> dict[str, Any]:
    """A row of a table of machines."""
    return {
        **machine.model_dump(mode="json"),
        "addresses": [address for nic in machine.nics for address in nic.addresses],
        "disk_names": [disk.name for disk in machine.disks],
    }


def ago(when: datetime | None) -> str:
    """How long ago something was, for a table."""
    if when is None:
        return "-"
    seconds = (datetime.now(UTC) - when).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if abs(seconds) >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
