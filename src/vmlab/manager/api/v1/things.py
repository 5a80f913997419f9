"""`/v1/disks`, `/v1/networks`, `/v1/templates`, `/v1/hosts`, `/v1/findings`: the other nouns."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from vmlab.manager import requests
from vmlab.manager.api.changing import route_of_change
from vmlab.manager.api.problems import documented
from vmlab.manager.api.service import Here, Paging, told, version_of
from vmlab.manager.documents import (
    AddressDocument,
    DiskDocument,
    DiskState,
    FindingDocument,
    HostDocument,
    NetworkDocument,
    Page,
    Severity,
    TemplateDocument,
)
from vmlab.manager.store import queries

__all__ = ["router"]

router = APIRouter(prefix="/v1")

Pattern = Annotated[str | None, Query(description="* and ? stand for any characters")]
Disk = Annotated[str, Path(description="name or id of the disk")]
Network = Annotated[str, Path(description="name or id of the network")]
Template = Annotated[str, Path(description="name of the template")]

# ------------------------------------------------------------------- disks


@router.get("/disks", response_model=Page[DiskDocument], responses=documented(404), tags=["disks"])
async def list_disks(
    here: Here,
    paging: Paging,
    state: DiskState | None = None,
    machine: Annotated[str | None, Query(description="name or id of who has it")] = None,
    name: Pattern = None,
) -> Response:
    """Disks, by name."""
    return told(
        await here.manager.database.read(
            queries.list_disks, state=state, machine=machine, name=name, **paging.arguments()
        )
    )


route_of_change(router, "/disks", requests.CreateDisk, name="create_disk", tag="disks")


@router.get("/disks/{disk}", response_model=DiskDocument, responses=documented(404), tags=["disks"])
async def show_disk(here: Here, disk: Disk) -> Response:
    """One disk; its ETag is its version."""
    document = await here.manager.database.read(
        lambda s: queries.disk_document(s, queries.find_disk(s, disk))
    )
    return told(document, headers=version_of(document))


route_of_change(
    router,
    "/disks/{disk}",
    requests.DeleteDisk,
    noun="disk",
    name="delete_disk",
    method="DELETE",
    tag="disks",
)

for _action, _model in {
    "attach": requests.AttachDisk,
    "detach": requests.DetachDisk,
    "resize": requests.ResizeDisk,
}.items():
    route_of_change(
        router,
        f"/disks/{{disk}}/actions/{_action}",
        _model,
        noun="disk",
        name=f"{_action}_disk",
        tag="disks",
    )

# ------------------------------------------------------------------- networks


@router.get(
    "/networks", response_model=Page[NetworkDocument], responses=documented(), tags=["networks"]
)
async def list_networks(
    here: Here, paging: Paging, name: Pattern = None, mode: str | None = None
) -> Response:
    """Networks, by name."""
    return told(
        await here.manager.database.read(
            queries.list_networks, name=name, mode=mode, **paging.arguments()
        )
    )


route_of_change(router, "/networks", requests.CreateNetwork, name="create_network", tag="networks")


@router.get(
    "/networks/{network}",
    response_model=NetworkDocument,
    responses=documented(404),
    tags=["networks"],
)
async def show_network(here: Here, network: Network) -> Response:
    """One network; its ETag is its version."""
    document = await here.manager.database.read(
        lambda s: queries.network_document(s, queries.find_network(s, network))
    )
    return told(document, headers=version_of(document))


@router.get(
    "/networks/{network}/addresses",
    response_model=Page[AddressDocument],
    responses=documented(404),
    tags=["networks"],
)
async def list_addresses(here: Here, paging: Paging, network: Network) -> Response:
    """Its addresses that are taken, in their order."""
    return told(
        await here.manager.database.read(
            queries.list_addresses, network=network, **paging.arguments()
        )
    )


route_of_change(
    router,
    "/networks/{network}",
    requests.DeleteNetwork,
    noun="network",
    name="delete_network",
    method="DELETE",
    tag="networks",
)

# ------------------------------------------------------------------- templates


@router.get(
    "/templates", response_model=Page[TemplateDocument], responses=documented(), tags=["templates"]
)
async def list_templates(here: Here, paging: Paging, name: Pattern = None) -> Response:
    """Templates, by name."""
    return told(
        await here.manager.database.read(queries.list_templates, name=name, **paging.arguments())
    )


route_of_change(
    router, "/templates", requests.CreateTemplate, name="create_template", tag="templates"
)


@router.get(
    "/templates/{template}",
    response_model=TemplateDocument,
    responses=documented(404),
    tags=["templates"],
)
async def show_template(here: Here, template: Template) -> Response:
    """One template; its ETag is its version."""
    document = await here.manager.database.read(
        lambda s: queries.template_document(s, queries.find_template(s, template))
    )
    return told(document, headers=version_of(document))


route_of_change(
    router,
    "/templates/{template}",
    requests.DeleteTemplate,
    noun="template",
    name="delete_template",
    method="DELETE",
    tag="templates",
)

# ------------------------------------------------------------------- hosts


@router.get("/hosts", response_model=Page[HostDocument], responses=documented(), tags=["hosts"])
async def list_hosts(here: Here) -> Response:
    """All hosts, by name, with what of them is taken."""
    return told(await here.manager.database.read(queries.list_hosts))


@router.get("/hosts/{host}", response_model=HostDocument, responses=documented(404), tags=["hosts"])
async def show_host(here: Here, host: str) -> Response:
    """One host."""
    return told(
        await here.manager.database.read(
            lambda s: queries.host_document(s, queries.find_host(s, host))
        )
    )


route_of_change(
    router, "/emergency-stop", requests.EmergencyStop, name="emergency_stop", tag="hosts"
)


# ------------------------------------------------------------------- findings


@router.get(
    "/findings", response_model=Page[FindingDocument], responses=documented(), tags=["findings"]
)
async def list_findings(
    *,
    here: Here,
    paging: Paging,
    code: str | None = None,
    severity: Severity | None = None,
    resolved: Annotated[bool | None, Query(description="only those, or only the others")] = None,
    subject: Annotated[str | None, Query(description="id or name of what it is about")] = None,
) -> Response:
    """What the observer has found, the newest first."""
    return told(
        await here.manager.database.read(
            queries.list_findings,
            code=code,
            severity=severity,
            resolved=resolved,
            subject=subject,
            **paging.arguments(),
        )
    )


@router.get(
    "/findings/{finding}",
    response_model=FindingDocument,
    responses=documented(404),
    tags=["findings"],
)
async def show_finding(here: Here, finding: str) -> Response:
    """One finding, with its evidence."""
    return told(
        await here.manager.database.read(
            lambda s: queries.finding_document(s, queries.find_finding(s, finding))
        )
    )


route_of_change(
    router,
    "/findings/{finding}/actions/repair",
    requests.RepairFinding,
    noun="finding",
    name="repair_finding",
    tag="findings",
)
