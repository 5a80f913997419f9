"""What there is to be asked about, noun by noun: machines, disks, networks and the rest.

Asking returns documents; a change returns its operation when that has succeeded, or at once with
`wait=False`. Names and ids are taken alike. Arguments that a request of `vmlab.manager.requests`
has are given by their names there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, TypeVar

from pydantic import BaseModel

from vmlab.guests.command import Sink
from vmlab.machine.documents import build
from vmlab.machine.metrics import MachineMetrics
from vmlab.manager import requests
from vmlab.manager.client.copying import archive_in, archive_out, copied_in, copied_out
from vmlab.manager.client.replies import page_of, told
from vmlab.manager.client.sending import path_of
from vmlab.manager.documents import (
    AddressDocument,
    DiskDocument,
    FindingDocument,
    HostDocument,
    MachineDocument,
    NetworkDocument,
    OperationDocument,
    Page,
    SnapshotDocument,
    TemplateDocument,
)

if TYPE_CHECKING:
    from vmlab.manager.api.security import IssuedToken, TokenDocument
    from vmlab.manager.api.v1.exports import ExportDocument
    from vmlab.manager.client import streams
    from vmlab.manager.client.asynchronous import AsyncClient

D = TypeVar("D", bound=BaseModel)
_PAGE: Final = 500
"""Items that are asked for at once where all are wanted."""

Watch = Callable[[OperationDocument], Awaitable[None]]
"""Is told how an operation goes while it is waited for."""


class Noun(Generic[D]):
    """One kind of thing that the manager has."""

    word: ClassVar[str]
    """As paths have it."""
    paged: ClassVar[bool] = True
    """Whether there may be more of them than are told at once."""
    document: type[D]

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def page(
        self, /, *, limit: int | None = None, cursor: str | None = None, **filters: Any
    ) -> Page[D]:
        """Some of them, and the cursor of the rest.

        Args:
            limit: How many at most; the manager's own limit if left out.
            cursor: Where the page before ended.
            **filters: What to leave out, such as `state="running"` or `label="role=web"`.
        """
        query = {name: _text(value) for name, value in filters.items()}
        return await self._client.get(
            path_of(self.word),
            page_of(self.document),
            {**query, "limit": limit, "cursor": cursor},
        )

    async def each(self, /, **filters: Any) -> AsyncIterator[D]:
        """All of them, page by page."""
        if self.paged:
            filters = {"limit": _PAGE, **filters}
        cursor = None
        while True:
            page = await self.page(cursor=cursor, **filters)
            for item in page.items:
                yield item
            if page.next is None:
                return
            cursor = page.next

    async def list(self, /, **filters: Any) -> tuple[D, ...]:
        """All of them."""
        return tuple([item async for item in self.each(**filters)])

    async def show(self, name: str) -> D:
        """One of them.

        Raises:
            ResourceNotFound: it is not there.
        """
        return await self._client.get(path_of(self.word, name), self.document)

    async def _do(
        self, model: type[BaseModel], wait: bool, /, **fields: object
    ) -> OperationDocument:
        """Ask for a change; fields that are None are left to the request's own defaults."""
        given = {name: value for name, value in fields.items() if value is not None}
        return await self._client.submit(build(model, given), wait=wait)


def _text(value: object) -> str | int | float | bool | None:
    """A filter as a query has it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if isinstance(value, datetime) else str(value)


class Machines(Noun[MachineDocument]):
    """Machines."""

    word = "machines"
    document = MachineDocument

    async def create(self, /, *, wait: bool = True, **fields: object) -> OperationDocument:
        """Make one; the fields are those of `CreateMachine`."""
        return await self._do(requests.CreateMachine, wait, **fields)

    async def update(
        self, /, machine: str, *, wait: bool = True, **fields: object
    ) -> OperationDocument:
        """Change its name, labels, policy or metadata; the fields are those of `UpdateMachine`."""
        return await self._do(requests.UpdateMachine, wait, machine=machine, **fields)

    async def start(self, machine: str, *, wait: bool = True) -> OperationDocument:
        """Boot it."""
        return await self._do(requests.StartMachine, wait, machine=machine)

    async def stop(
        self,
        machine: str,
        *,
        graceful: bool = True,
        timeout: float | None = None,
        wait: bool = True,
    ) -> OperationDocument:
        """Shut it down: the guest is asked and given `timeout` seconds, unless not `graceful`."""
        return await self._do(
            requests.StopMachine, wait, machine=machine, graceful=graceful, timeout=timeout
        )

    async def restart(
        self, machine: str, *, graceful: bool = True, wait: bool = True
    ) -> OperationDocument:
        """Boot it again."""
        return await self._do(requests.RestartMachine, wait, machine=machine, graceful=graceful)

    async def pause(self, machine: str, *, wait: bool = True) -> OperationDocument:
        """Stop its vCPUs."""
        return await self._do(requests.PauseMachine, wait, machine=machine)

    async def resume(self, machine: str, *, wait: bool = True) -> OperationDocument:
        """Let its vCPUs run on."""
        return await self._do(requests.ResumeMachine, wait, machine=machine)

    async def resize(
        self,
        machine: str,
        *,
        vcpus: int | None = None,
        memory: int | str | None = None,
        wait: bool = True,
    ) -> OperationDocument:
        """Change its vCPUs and memory (bytes, or text such as "1G")."""
        return await self._do(
            requests.ResizeMachine, wait, machine=machine, vcpus=vcpus, memory=memory
        )

    async def delete(
        self, machine: str, *, force: bool = False, wait: bool = True
    ) -> OperationDocument:
        """Remove it with the storage that is its own; `force` kills it first."""
        return await self._do(requests.DeleteMachine, wait, machine=machine, force=force)

    async def snapshot(
        self,
        machine: str,
        name: str,
        *,
        memory: bool | None = None,
        expires: datetime | None = None,
        wait: bool = True,
    ) -> OperationDocument:
        """Save its disks, and its memory if it is live and its hypervisor can."""
        return await self._do(
            requests.SnapshotMachine,
            wait,
            machine=machine,
            name=name,
            memory=memory,
            expires=expires,
        )

    async def snapshots(self, machine: str) -> tuple[SnapshotDocument, ...]:
        """Its snapshots."""
        return await self._client.snapshots.list(machine=machine)

    async def delete_snapshot(
        self, machine: str, name: str, *, wait: bool = True
    ) -> OperationDocument:
        """Remove one of its snapshots."""
        return await self._do(requests.DeleteSnapshot, wait, machine=machine, name=name)

    async def restore(self, machine: str, snapshot: str, *, wait: bool = True) -> OperationDocument:
        """Bring a snapshot back."""
        return await self._do(requests.RestoreMachine, wait, machine=machine, snapshot=snapshot)

    async def clone(
        self,
        machine: str,
        name: str | None = None,
        *,
        snapshot: str | None = None,
        wait: bool = True,
    ) -> OperationDocument:
        """Make a second one of it, from a snapshot or as it is now."""
        return await self._do(
            requests.CloneMachine, wait, machine=machine, name=name, snapshot=snapshot
        )

    async def migrate(
        self, machine: str, host: str, *, live: bool | None = None, wait: bool = True
    ) -> OperationDocument:
        """Move it to another host of the same hypervisor."""
        return await self._do(requests.MigrateMachine, wait, machine=machine, host=host, live=live)

    async def export(self, machine: str, path: str, *, wait: bool = True) -> OperationDocument:
        """Write it to one file, which is the manager's to write."""
        return await self._do(requests.ExportMachine, wait, machine=machine, path=path)

    async def import_(
        self, path: str, name: str | None = None, *, wait: bool = True
    ) -> OperationDocument:
        """Make a machine of an exported file, which is the manager's to read."""
        return await self._do(requests.ImportMachine, wait, path=path, name=name)

    async def log(self, machine: str) -> bytes:
        """What its console has printed so far."""
        return await self._client.get_bytes(path_of(self.word, machine, "console"))

    async def metrics(self, machine: str) -> MachineMetrics:
        """What it uses now; it has to be live."""
        return await self._client.get(path_of(self.word, machine, "metrics"), MachineMetrics)

    def console(
        self, machine: str, *, history: int = 0
    ) -> AbstractAsyncContextManager[streams.RemoteConsole]:
        """Its console from now on, both ways; a context manager.

        Args:
            machine: Its name or id.
            history: How much of what was printed before is read first: bytes, 512 KiB at most.
        """
        from vmlab.manager.client import streams

        return streams.consoled(self._client.sender, machine, history=history)

    def command(
        self,
        machine: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> AbstractAsyncContextManager[streams.RemoteCommand]:
        """A command in its guest; a context manager. `terminal` is rows and columns of one."""
        from vmlab.manager.client import streams

        return streams.commanded(
            self._client.sender, machine, argv, env=env, cwd=cwd, terminal=terminal
        )

    async def execute(
        self,
        machine: str,
        argv: Sequence[str],
        *,
        stdin: AsyncIterator[bytes] | None = None,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> streams.Exit:
        """Run a command in its guest to its end; what nobody takes of its output is dropped.

        Raises:
            ChannelClosed: the guest or the manager went away meanwhile.
        """
        from vmlab.manager.client import streams

        async with self.command(machine, argv, env=env, cwd=cwd) as command:
            return await streams.perform(
                command, stdin, stdout=stdout or _drop, stderr=stderr or _drop
            )

    async def copy_in(self, machine: str, source: Path, target: str) -> None:
        """Copy a file or a tree of this host into its guest; modes and links are kept.

        Raises:
            OperationFailed: it cannot be read.
        """
        await copied_in(self._client.sender, machine, source, PurePosixPath(target))

    async def copy_out(self, machine: str, source: str, target: Path) -> None:
        """Copy a file or a tree of its guest to a place here that is free.

        Raises:
            ResourceNotFound: the guest has no such file.
            OperationFailed: the place is taken or cannot be written.
        """
        await copied_out(self._client.sender, machine, PurePosixPath(source), target)


async def _drop(data: bytes) -> None:
    """Take output that nobody wants."""


class Disks(Noun[DiskDocument]):
    """Disks of the store's."""

    word = "disks"
    document = DiskDocument

    async def create(
        self, /, name: str, *, wait: bool = True, **fields: object
    ) -> OperationDocument:
        """Make one; the fields are those of `CreateDisk`."""
        return await self._do(requests.CreateDisk, wait, name=name, **fields)

    async def attach(
        self, /, disk: str, machine: str, *, wait: bool = True, **fields: object
    ) -> OperationDocument:
        """Give it to a machine; the fields are those of `AttachDisk`."""
        return await self._do(requests.AttachDisk, wait, disk=disk, machine=machine, **fields)

    async def detach(self, disk: str, *, wait: bool = True) -> OperationDocument:
        """Take it from its machine."""
        return await self._do(requests.DetachDisk, wait, disk=disk)

    async def resize(self, disk: str, size: int | str, *, wait: bool = True) -> OperationDocument:
        """Grow it, to bytes or text such as "2G"."""
        return await self._do(requests.ResizeDisk, wait, disk=disk, size=size)

    async def delete(self, disk: str, *, wait: bool = True) -> OperationDocument:
        """Remove it."""
        return await self._do(requests.DeleteDisk, wait, disk=disk)


class Networks(Noun[NetworkDocument]):
    """Networks."""

    word = "networks"
    document = NetworkDocument

    async def create(
        self, /, name: str, *, wait: bool = True, **fields: object
    ) -> OperationDocument:
        """Make one; the fields are those of `CreateNetwork`."""
        return await self._do(requests.CreateNetwork, wait, name=name, **fields)

    async def delete(self, network: str, *, wait: bool = True) -> OperationDocument:
        """Remove it."""
        return await self._do(requests.DeleteNetwork, wait, network=network)

    async def addresses(self, network: str) -> tuple[AddressDocument, ...]:
        """Its addresses that are taken."""
        return await self._client.all_of(path_of(self.word, network, "addresses"), AddressDocument)


class Templates(Noun[TemplateDocument]):
    """Templates."""

    word = "templates"
    document = TemplateDocument

    async def create(
        self, /, name: str, *, wait: bool = True, **fields: object
    ) -> OperationDocument:
        """Make one; the fields are those of `CreateTemplate`."""
        return await self._do(requests.CreateTemplate, wait, name=name, **fields)

    async def delete(self, template: str, *, wait: bool = True) -> OperationDocument:
        """Remove it."""
        return await self._do(requests.DeleteTemplate, wait, template=template)


class Snapshots(Noun[SnapshotDocument]):
    """Snapshots of all machines; `list(machine=...)` has those of one."""

    word = "snapshots"
    document = SnapshotDocument


class Hosts(Noun[HostDocument]):
    """Hypervisors that machines run on."""

    word = "hosts"
    document = HostDocument
    paged = False


class Findings(Noun[FindingDocument]):
    """What the observer has found."""

    word = "findings"
    document = FindingDocument

    async def repair(
        self,
        finding: str,
        action: Literal["report", "adopt", "reconcile", "quarantine"],
        *,
        name: str | None = None,
        wait: bool = True,
    ) -> OperationDocument:
        """Do something about one; `name` is what is to be removed, where data would go."""
        return await self._do(
            requests.RepairFinding, wait, finding=finding, action=action, name=name
        )


class Operations(Noun[OperationDocument]):
    """Changes that were asked for."""

    word = "operations"
    document = OperationDocument

    async def wait(
        self, operation: str, *, timeout: float | None = None, watch: Watch | None = None
    ) -> OperationDocument:
        """Wait for its end.

        Args:
            operation: Its id.
            timeout: Seconds after which it is told as it is then; None waits for its end.
            watch: Is told of it as it goes, some times in a second.
        """
        return await self._client.wait(operation, timeout=timeout, watch=watch)

    async def cancel(self, operation: str) -> OperationDocument:
        """Ask for it to be undone and ended; it goes on until that is done."""
        return await self._client.post(
            path_of(self.word, operation, "cancel"), OperationDocument, None
        )


class Exports:
    """Archives that machines were exported to, and those that machines can be made of."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> tuple[ExportDocument, ...]:
        """All of them, by name."""
        from vmlab.manager.api.v1.exports import ExportDocument

        return await self._client.all_of(path_of("exports"), ExportDocument)

    async def download(self, export: str, target: Path) -> None:
        """Copy one to a place here that is free."""
        await archive_out(self._client.sender, export, Path(target))

    async def upload(self, export: str, source: Path) -> ExportDocument:
        """Bring a file of this host there, under that name; `machines.import_` makes a machine."""
        from vmlab.manager.api.v1.exports import ExportDocument

        sender = self._client.sender
        return told(ExportDocument, await archive_in(sender, export, Path(source)), sender.address)

    async def delete(self, export: str) -> None:
        """Remove one; machines that were made of it stay."""
        await self._client.sender.request("DELETE", path_of("exports", export))


class Tokens:
    """Tokens of who may ask a manager that is not asked over its unix socket."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> tuple[TokenDocument, ...]:
        """Those that were not revoked, without what is secret about them."""
        from vmlab.manager.api.security import TokenDocument

        return await self._client.all_of(path_of("tokens"), TokenDocument)

    async def create(self, /, name: str, **fields: object) -> IssuedToken:
        """Make one, which is told this once; the fields are those of `NewToken`."""
        from vmlab.manager.api.security import IssuedToken, NewToken

        given = {key: value for key, value in fields.items() if value is not None}
        wanted = build(NewToken, {"name": name, **given})
        data = wanted.model_dump(mode="json", exclude_unset=True)
        # Asked twice, it would be two.
        return await self._client.post(path_of("tokens"), IssuedToken, data, safe=False)

    async def revoke(self, token: str) -> None:
        """Have it be good for nothing from now on; `token` is its id."""
        await self._client.sender.request("DELETE", path_of("tokens", token))
