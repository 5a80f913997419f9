"""VMAN's routes, for its clients: /templates, /vms, /disks, /observer, /network.

The same operations as under `/v1`, told as VMAN documents them: synchronously (a change is answered
when it has ended), whole lists, 201, 202, 200 and 204, and 400 wherever a request contradicts what
is there. A machine's id is its name. What VMAN has no word for is told as the nearest it has: a
failed machine is in state `error`, one on its way is what it was told to be. `ram_amount` is in GB
(2^30 bytes), as there; fractions (0.5) are taken besides. Actions that take longer than a client
waits are answered with 202 when it is known that they are under way.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, Response

from vmlab.lab.boot import Wish
from vmlab.lab.preference import preference
from vmlab.machine.documents import build
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidState,
    OperationFailed,
    ResourceExhausted,
    ResourceNotFound,
    UnsupportedOperation,
    from_record,
)
from vmlab.machine.sizes import GIB
from vmlab.manager import requests
from vmlab.manager.api.changing import Change, ended
from vmlab.manager.api.health import is_running
from vmlab.manager.api.problems import BadRequest, documented
from vmlab.manager.api.service import ASK_SECONDS, Here, Service, Who
from vmlab.manager.api.vman_payloads import (
    VM,
    ActionStatus,
    Disk,
    DiskAttach,
    DiskCreate,
    NetworkConfig,
    NetworkConfigNotConfigured,
    ObserverStatus,
    State,
    VMConsole,
    VMCreate,
    VMMetadata,
    VMMetadataCreate,
    VMTemplate,
    disk_of,
    issue_of,
    metadata_of,
    template_of,
    vm_of,
)
from vmlab.manager.documents import ENDED, NetworkDocument
from vmlab.manager.store import queries
from vmlab.manager.store.failures import Conflict
from vmlab.manager.store.pages import LARGEST_PAGE
from vmlab.manager.store.tables import TemplateRow
from vmlab.manager.store.told import template_documents

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["router"]

router = APIRouter(tags=["vman"])

_PATIENCE: Final = 300.0
"""Seconds that a change is waited for."""
_CONSOLE_BYTES: Final = 50 * 1024
"""Bytes of the end of a console's log that are told."""

_CONTRADICTIONS: Final = (
    Conflict,
    InvalidState,
    UnsupportedOperation,
    ResourceExhausted,
    OperationFailed,
)
"""What VMAN answers with 400."""

# ------------------------------------------------------------------- doing


class Doing:
    """Has changes done as VMAN does: the answer is when they have ended."""

    def __init__(self, service: Service, change: Change) -> None:
        self._service = service
        self._change = change

    async def done(self, wanted: requests.Request) -> dict[str, Any] | None:
        """Do it; returns the operation's result.

        Raises:
            BadRequest: it contradicts what is there, or it failed.
            DeadlineExceeded: it goes on.
        """
        try:
            operation = await self._change.taken(wanted)
            operation = await ended(self._service, operation, _PATIENCE)
            if operation.state not in ENDED:
                raise DeadlineExceeded(
                    operation.kind,
                    seconds=_PATIENCE,
                    hint=f"it goes on: /v1/operations/{operation.id}",
                )
            if operation.state != "succeeded":
                raise from_record(operation.error or {"message": f"it was {operation.state}"})
        except ResourceNotFound:
            raise
        except _CONTRADICTIONS as error:
            raise BadRequest(str(error), hint=error.hint) from error
        return operation.result


async def _doing(here: Here, who: Who, request: Request) -> Doing:
    return Doing(here, Change(here, who, request, dry_run=False))


Do = Annotated[Doing, Depends(_doing)]
VmId = Annotated[str, Path(description="name or id")]
_CHANGES = documented(404, 413, 502, 504)
_LOOKS = documented(404, 502, 504)


def _json(payload: BaseModel | Sequence[BaseModel], status: int = 200) -> Response:
    if isinstance(payload, BaseModel):
        return JSONResponse(payload.model_dump(mode="json"), status)
    return JSONResponse([each.model_dump(mode="json") for each in payload], status)


# ------------------------------------------------------------------- templates


def _boots(manager: Manager) -> dict[str, Any]:
    """What machines boot whose template names nothing: VMAN's default boot disk, here an image.

    It is that of `vmlab run`. Where all hosts are simulated, so are their guests.
    """
    hypervisors = [manager.hosts.setting(name).hypervisor for name in manager.hosts.names]
    real = [name for name in hypervisors if name != "simulated"]
    if not real:
        return {"spec": {}}
    preferred = preference(Wish(), None)
    chosen = preferred if preferred.hypervisor in real else preference(Wish(), real[0])
    return {"image": chosen.tiny_image}


@router.post("/templates", status_code=201, response_model=VMTemplate, responses=_CHANGES)
async def create_vm_template(here: Here, do: Do, body: VMTemplate) -> Response:
    """Make a template."""
    wanted = {
        "name": body.name,
        "vcpus": body.cpu_count,
        "memory": int(body.ram_amount * GIB),
        **await asyncio.to_thread(_boots, here.manager),
    }
    await do.done(build(requests.CreateTemplate, wanted))
    document = await here.manager.database.read(
        lambda s: queries.template_document(s, queries.find_template(s, body.name))
    )
    return _json(template_of(document), 201)


@router.get("/templates", response_model=list[VMTemplate], responses=documented())
async def list_vm_templates(here: Here) -> Response:
    """All templates."""
    found = await here.manager.database.read(_all, queries.list_templates)
    return _json([template_of(each) for each in found])


def _all(session: Session, /, listing: Any, **filters: Any) -> list[Any]:
    """Everything that a list has, page by page."""
    found: list[Any] = []
    cursor = None
    while True:
        page = listing(session, limit=LARGEST_PAGE, cursor=cursor, **filters)
        found.extend(page.items)
        cursor = page.next
        if cursor is None:
            return found


@router.delete("/templates/{name}", status_code=204, response_model=None, responses=_CHANGES)
async def delete_vm_template(do: Do, name: str) -> Response:
    """Remove a template that no machine was made of."""
    await do.done(build(requests.DeleteTemplate, {"template": name}))
    return Response(status_code=204)


# ------------------------------------------------------------------- machines


def _vms(session: Session, state: State | None, only: str | None = None) -> list[VM]:
    """Machines as VMAN has them; `only` is the name or id of one."""
    if only is not None:
        machines = [queries.machine_document(session, queries.find_machine(session, only))]
    else:
        machines = _all(session, queries.list_machines)
    used = {each.template for each in machines if each.template is not None}
    rows = session.scalars(select(TemplateRow).where(TemplateRow.name.in_(used))).all()
    templates = {each.name: each for each in template_documents(session, rows)}
    found = [vm_of(each, templates) for each in machines]
    return [each for each in found if state is None or each.state == state]


@router.post("/vms", status_code=201, response_model=VM, responses=_CHANGES)
async def create_vm(here: Here, do: Do, body: VMCreate) -> Response:
    """Make a machine from a template; without a name it gets a UUID for one."""
    name = body.name or str(uuid.uuid4())
    wanted = build(requests.CreateMachine, {"name": name, "template": body.template_name})
    try:
        await do.done(wanted)
    except ResourceNotFound as error:
        # What the payload names is not what the path names.
        raise BadRequest(str(error), hint=error.hint) from error
    return _json((await here.manager.database.read(_vms, None, name))[0], 201)


@router.get("/vms", response_model=list[VM], responses=documented())
async def list_vms(
    here: Here, state: Annotated[State | None, Query(description="only those")] = None
) -> Response:
    """All machines."""
    return _json(await here.manager.database.read(_vms, state))


@router.get("/vms/{vm_id}", response_model=VM, responses=_LOOKS)
async def show_vm(here: Here, vm_id: VmId) -> Response:
    """One machine."""
    return _json((await here.manager.database.read(_vms, None, vm_id))[0])


@router.delete("/vms/{vm_id}", status_code=204, response_model=None, responses=_CHANGES)
async def delete_vm(do: Do, vm_id: VmId) -> Response:
    """Remove a machine; one that runs is stopped first."""
    await do.done(build(requests.DeleteMachine, {"machine": vm_id, "force": True}))
    return Response(status_code=204)


async def _act(do: Doing, wanted: requests.Request, status: str) -> Response:
    try:
        await do.done(wanted)
    except DeadlineExceeded:
        pass  # 202 says that it is under way, and so it is
    return _json(build(ActionStatus, {"status": status}), 202)


@router.post(
    "/vms/{vm_id}/actions/start", status_code=202, response_model=ActionStatus, responses=_CHANGES
)
async def start_vm(do: Do, vm_id: VmId) -> Response:
    """Boot it."""
    return await _act(do, build(requests.StartMachine, {"machine": vm_id}), "started")


@router.post(
    "/vms/{vm_id}/actions/stop", status_code=202, response_model=ActionStatus, responses=_CHANGES
)
async def stop_vm(do: Do, vm_id: VmId) -> Response:
    """Shut it down: the power button, then an end to its process."""
    return await _act(do, build(requests.StopMachine, {"machine": vm_id}), "stopped")


@router.post(
    "/vms/{vm_id}/actions/restart", status_code=202, response_model=ActionStatus, responses=_CHANGES
)
async def restart_vm(here: Here, do: Do, vm_id: VmId) -> Response:
    """Boot it again; one that is not running is started."""
    state = await here.manager.database.read(lambda s: queries.find_machine(s, vm_id).state)
    if state == "running":
        return await _act(do, build(requests.RestartMachine, {"machine": vm_id}), "restarted")
    return await _act(do, build(requests.StartMachine, {"machine": vm_id}), "restarted")


@router.get("/vms/{vm_id}/console", response_model=VMConsole, responses=_LOOKS)
async def show_vm_console(here: Here, vm_id: VmId) -> Response:
    """The last 50 KiB of what its console has printed."""
    name = await here.manager.database.read(lambda s: queries.find_machine(s, vm_id).name)
    machine = await here.machine(vm_id)
    async with await machine.console(timeout=ASK_SECONDS) as console:
        printed = await console.log()
    text = printed[-_CONSOLE_BYTES:].decode("utf-8", "replace")
    return _json(VMConsole(vm_id=name, console=text, size=len(text), file_size=len(printed)))


@router.get("/vms/{vm_id}/metadata", response_model=VMMetadata, responses=_LOOKS)
async def show_vm_metadata(here: Here, vm_id: VmId) -> Response:
    """What its cloud-init is told."""
    return _json(
        await here.manager.database.read(lambda s: metadata_of(queries.find_machine(s, vm_id)))
    )


@router.put("/vms/{vm_id}/metadata", response_model=VMMetadata, responses=_CHANGES)
async def update_vm_metadata(here: Here, do: Do, vm_id: VmId, body: VMMetadataCreate) -> Response:
    """Change what its cloud-init is told."""
    kept = await here.manager.database.read(lambda s: metadata_of(queries.find_machine(s, vm_id)))
    keys = body.ssh_keys if body.ssh_keys is not None else kept.ssh_keys
    metadata = {
        "hostname": body.hostname if body.hostname is not None else kept.hostname,
        "user_data": body.user_data if body.user_data is not None else kept.user_data,
        "ssh_keys": [key.strip() for key in (keys or "").splitlines() if key.strip()],
    }
    await do.done(build(requests.UpdateMachine, {"machine": vm_id, "metadata": metadata}))
    return await show_vm_metadata(here, vm_id)


@router.delete("/vms/{vm_id}/metadata", status_code=204, response_model=None, responses=_CHANGES)
async def delete_vm_metadata(do: Do, vm_id: VmId) -> Response:
    """Tell its cloud-init nothing."""
    await do.done(build(requests.UpdateMachine, {"machine": vm_id, "metadata": {}}))
    return Response(status_code=204)


# ------------------------------------------------------------------- disks


@router.post("/disks", status_code=201, response_model=Disk, responses=_CHANGES)
async def create_vm_disk(here: Here, do: Do, body: DiskCreate) -> Response:
    """Make a disk."""
    name = f"disk-{uuid.uuid4()}"
    wanted = {"name": name, "size": body.size * GIB, "mount_point": body.mount_point}
    await do.done(build(requests.CreateDisk, wanted))
    document = await here.manager.database.read(
        lambda s: queries.disk_document(s, queries.find_disk(s, name))
    )
    return _json(disk_of(document), 201)


@router.get("/disks", response_model=list[Disk], responses=documented())
async def list_vm_disks(here: Here) -> Response:
    """All disks."""
    found = await here.manager.database.read(_all, queries.list_disks)
    return _json([disk_of(each) for each in found])


@router.get("/disks/{disk_id}", response_model=Disk, responses=_LOOKS)
async def show_vm_disk(here: Here, disk_id: str) -> Response:
    """One disk."""
    document = await here.manager.database.read(
        lambda s: queries.disk_document(s, queries.find_disk(s, disk_id))
    )
    return _json(disk_of(document))


@router.delete("/disks/{disk_id}", status_code=204, response_model=None, responses=_CHANGES)
async def delete_vm_disk(here: Here, do: Do, disk_id: str) -> Response:
    """Remove a disk that no machine has."""
    document = await here.manager.database.read(
        lambda s: queries.disk_document(s, queries.find_disk(s, disk_id))
    )
    if document.machine is not None:
        raise BadRequest(
            f"disk {document.name!r} is attached to {document.machine!r}", hint="detach it first"
        )
    await do.done(build(requests.DeleteDisk, {"disk": disk_id}))
    return Response(status_code=204)


@router.post("/disks/{disk_id}/attach", response_model=ActionStatus, responses=_CHANGES)
async def attach_vm_disk(here: Here, do: Do, disk_id: str, body: DiskAttach) -> Response:
    """Give it to a machine."""
    place = await here.manager.database.read(lambda s: queries.find_disk(s, disk_id).mount_point)
    wanted = {"disk": disk_id, "machine": body.vm_id, "mount_point": place}
    await do.done(build(requests.AttachDisk, wanted))
    return _json(ActionStatus(status="attached"))


@router.post("/disks/{disk_id}/detach", response_model=ActionStatus, responses=_CHANGES)
async def detach_vm_disk(do: Do, disk_id: str) -> Response:
    """Take it from its machine."""
    await do.done(build(requests.DetachDisk, {"disk": disk_id}))
    return _json(ActionStatus(status="detached"))


# ------------------------------------------------------------------- observer, network


@router.get("/observer/status", response_model=ObserverStatus, responses=documented())
async def show_observer(here: Here) -> Response:
    """The observer, and what it has found."""
    found = await here.manager.database.read(_all, queries.list_findings, resolved=False)
    issues = tuple(map(issue_of, found))
    return _json(
        ObserverStatus(
            status="running" if is_running(here.manager, "observer") else "stopped",
            check_interval=here.manager.settings.sweep_seconds,
            last_issues_count=len(issues),
            last_issues=issues,
        )
    )


@router.get(
    "/network/config",
    response_model=NetworkConfig | NetworkConfigNotConfigured,
    responses=documented(),
)
async def show_network_config(here: Here) -> Response:
    """The first bridged network, by name."""
    return _json(await here.manager.database.read(_network_config))


def _network_config(session: Session) -> BaseModel:
    networks: list[NetworkDocument] = _all(session, queries.list_networks, mode="bridged")
    network = next((each for each in networks if each.subnet is not None), None)
    if network is None or network.subnet is None:
        return NetworkConfigNotConfigured()
    taken = _all(session, queries.list_addresses, network=network.name)
    return NetworkConfig(
        vlan_id=network.vlan or 0,
        bridge_name=network.bridge or "",
        subnet=network.subnet,
        gateway=network.gateway,
        dns=network.dns or None,
        allocated_ips=tuple(each.address for each in taken),
        available_ips=network.free or 0,
    )
