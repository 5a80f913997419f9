"""The pages of machines: the list, a new one, one machine, and what is done with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import select
from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError
from vmlab.machine.states import OPERATIONS, MachineState
from vmlab.manager import requests
from vmlab.manager.documents import (
    EventDocument,
    FindingDocument,
    MachineDocument,
    OperationDocument,
    Page,
    SnapshotDocument,
)
from vmlab.manager.store import queries
from vmlab.manager.store.tables import EventRow, HostRow
from vmlab.manager.web.boot import booting
from vmlab.manager.web.forms import Form, made, names_itself
from vmlab.manager.web.visit import Pages, Visit, nonce, problems_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["PAGE", "actions_of", "anywhere", "host_names", "image_names", "last_events", "routes"]

PAGE: Final = 50
_CHOICES: Final = 200
"""Things that a list to choose from has at most; whatever else there is can be named elsewhere."""
_ACTIONS: Final = ("start", "stop", "kill", "restart", "pause", "resume")
_TOPICS: Final = ("machine", "disk", "address", "snapshot", "finding")


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of these pages."""
    return [
        pages.get("/machines", machines),
        pages.get("/machines/new", new_machine),
        pages.post("/machines", create_machine),
        pages.get("/machines/{machine}", machine),
        pages.post("/machines/{machine}/actions", act),
        pages.post("/machines/{machine}/attach", attach),
    ]


def actions_of(machine: MachineDocument) -> list[str]:
    """What can be done with a machine in its state, by a button alone."""
    return [action for action in _ACTIONS if machine.state in OPERATIONS[action]]


# ------------------------------------------------------------------------------------- the list


async def machines(visit: Visit) -> Response:
    """The machines that the filters leave, with what can be done with each."""
    filters = visit.filters("name", "state", "host", "label", "template")
    page, hosts = await visit.read(_read_machines, filters)
    return visit.page(
        "machines",
        topics=("machine", "address"),
        page=page,
        filters=filters,
        hosts=hosts,
        states=[state.value for state in MachineState],
        actions=actions_of,
    )


def _read_machines(
    session: Session, filters: dict[str, str | None]
) -> tuple[Page[MachineDocument], list[str]]:
    page = queries.list_machines(
        session,
        name=anywhere(filters["name"]),
        state=filters["state"],
        host=filters["host"],
        label=filters["label"],
        template=filters["template"],
        cursor=filters["cursor"],
        limit=PAGE,
        count=True,
    )
    return page, host_names(session)


def anywhere(text: str | None) -> str | None:
    """A pattern for names that have `text` somewhere; one with * or ? stands as it is."""
    if text is None or "*" in text or "?" in text:
        return text
    return f"*{text}*"


def host_names(session: Session) -> list[str]:
    """The names of all hosts."""
    return list(session.scalars(select(HostRow.name).order_by(HostRow.name)))


# ------------------------------------------------------------------------------------- a new one


@dataclass(frozen=True, slots=True)
class _Choices:
    """What a new machine can be made of."""

    templates: list[str]
    hosts: list[str]
    networks: list[str]
    disks: list[str]


def _choices(session: Session) -> _Choices:
    disks = queries.list_disks(session, state="available", limit=_CHOICES)
    networks = [one.name for one in queries.list_networks(session, limit=_CHOICES).items]
    return _Choices(
        [one.name for one in queries.list_templates(session, limit=_CHOICES).items],
        host_names(session),
        ["user", "none", *networks],
        [disk.name for disk in disks.items],
    )


def image_names() -> list[str]:
    """The images that are there, and those that would be built when they are asked for."""
    from vmlab.images import ImageStore
    from vmlab.images.recipe import builtin_names

    return sorted({image.name for image in ImageStore().images()} | set(builtin_names()))


async def new_machine(
    visit: Visit, refusal: VmlabError | None = None, status: int = 200
) -> Response:
    """The form for a new machine, as it was filled in before if it was refused."""
    choices = await visit.read(_choices)
    return visit.page(
        "machine_new",
        status=status,
        form=visit.form,
        error=refusal,
        problems=problems_of(refusal) if isinstance(refusal, InvalidSpec) else {},
        images=await asyncio.to_thread(image_names),
        templates=choices.templates,
        hosts=choices.hosts,
        networks=choices.networks,
        disks=choices.disks,
    )


async def create_machine(visit: Visit) -> Response:
    """Have one made as the form says, and go on with its page."""
    try:
        operation = await visit.submit(_new(visit.form))
    except VmlabError as refusal:
        return await new_machine(visit, refusal, visit.status_of(refusal))
    if operation.target is None or operation.dry_run:
        return visit.see(f"/ui/operations/{operation.id}")
    return visit.see(f"/ui/machines/{operation.target}")


def _new(form: Form) -> requests.CreateMachine:
    network = form.text("network") or "user"
    return made(
        requests.CreateMachine,
        name=form.text("name"),
        template=form.text("template"),
        image=form.text("image"),
        spec=form.json("spec"),
        host=form.text("host"),
        vcpus=form.whole("vcpus"),
        memory=form.text("memory"),
        disks=list(form.all("disks")),
        nics=[] if network == "none" else [{"network": network}],
        labels=form.pairs("labels"),
        policy={"autostart": form.flag("autostart")},
        metadata={
            "ssh_keys": list(form.lines("ssh_keys")),
            **({"user_data": form.raw("user_data")} if form.text("user_data") else {}),
        },
        start=form.flag("start"),
    )


# ------------------------------------------------------------------------------------- one machine


@dataclass(frozen=True, slots=True)
class _Known:
    """What the page of a machine tells, read in one transaction."""

    machine: MachineDocument
    operations: list[OperationDocument]
    findings: list[FindingDocument]
    snapshots: list[SnapshotDocument]
    events: list[EventDocument]
    available: list[str]
    others: list[str]


def _read_machine(session: Session, key: str) -> _Known:
    row = queries.find_machine(session, key)
    available = queries.list_disks(session, state="available", limit=_CHOICES)
    alike = select(HostRow.name).where(
        HostRow.hypervisor == row.hypervisor, HostRow.name != row.host
    )
    return _Known(
        machine=queries.machine_document(session, row),
        operations=list(queries.list_operations(session, target=row.id, limit=10).items),
        findings=list(
            queries.list_findings(session, subject=row.id, resolved=False, limit=PAGE).items
        ),
        snapshots=list(queries.list_snapshots(session, machine=row.id, limit=_CHOICES).items),
        events=last_events(session, 100, subject=row.id),
        available=[disk.name for disk in available.items],
        others=list(session.scalars(alike.order_by(HostRow.name))),
    )


def last_events(
    session: Session, limit: int, *, subject: str | None = None, kind: str | None = None
) -> list[EventDocument]:
    """The last events of something, the newest first.

    Args:
        session: The session.
        limit: How many at most.
        subject: Id or name of what they happened to; anything if None.
        kind: What their kinds begin with: "machine.".
    """
    query = select(EventRow).order_by(EventRow.id.desc()).limit(limit)
    if subject is not None:
        query = query.where((EventRow.subject == subject) | (EventRow.name == subject))
    if kind is not None:
        query = query.where(EventRow.kind.startswith(kind, autoescape=True))
    return [queries.event_document(session, row) for row in session.scalars(query)]


async def machine(visit: Visit) -> Response:
    """Everything about one machine."""
    known = await visit.read(_read_machine, visit.path("machine"))
    return visit.page(
        "machine",
        topics=_TOPICS,
        style_nonce=nonce(),
        machine=known.machine,
        operations=known.operations,
        findings=known.findings,
        snapshots=known.snapshots,
        events=known.events[:30],
        available=known.available,
        others=known.others,
        boot=booting(known.machine, known.operations, known.events),
        actions=actions_of,
    )


async def act(visit: Visit) -> Response:
    """Have something done with a machine: what the button that was pressed says."""
    document = await visit.read(
        lambda session: queries.machine_document(
            session, queries.find_machine(session, visit.path("machine"))
        )
    )
    operation = await visit.submit(_action(document, visit.form))
    gone = operation.kind == "machine.delete"
    return visit.went_on(operation, "/ui/machines" if gone else f"/ui/machines/{document.id}")


def _action(machine: MachineDocument, form: Form) -> requests.Request:
    """The request that a form on a machine's page means.

    Raises:
        InvalidSpec: It means none.
    """
    key = machine.id
    match form.raw("action"):
        case "start":
            return requests.StartMachine(machine=key)
        case "stop":
            return requests.StopMachine(machine=key)
        case "kill":
            return requests.StopMachine(machine=key, graceful=False)
        case "restart":
            return requests.RestartMachine(machine=key)
        case "pause":
            return requests.PauseMachine(machine=key)
        case "resume":
            return requests.ResumeMachine(machine=key)
        case "resize":
            return made(
                requests.ResizeMachine,
                machine=key,
                vcpus=form.whole("vcpus"),
                memory=form.text("memory"),
            )
        case "update":
            policy = machine.policy.model_copy(update={"autostart": form.flag("autostart")})
            return made(
                requests.UpdateMachine,
                machine=key,
                name=form.text("name"),
                labels=form.pairs("labels"),
                policy=policy.model_dump(),
            )
        case "clone":
            return made(
                requests.CloneMachine,
                machine=key,
                name=form.text("name"),
                snapshot=form.text("snapshot"),
            )
        case "migrate":
            return made(requests.MigrateMachine, machine=key, host=form.raw("host"))
        case "snapshot":
            return made(requests.SnapshotMachine, machine=key, name=form.text("name"))
        case "restore":
            return made(requests.RestoreMachine, machine=key, snapshot=form.text("snapshot"))
        case "forget":
            return made(requests.DeleteSnapshot, machine=key, name=form.text("snapshot"))
        case "delete":
            names_itself(form, machine.name, "machine")
            return requests.DeleteMachine(machine=key, force=form.flag("force"))
        case other:
            raise InvalidSpec(
                [SpecProblem("action", other, "one of the page's buttons")], what="the form"
            )


async def attach(visit: Visit) -> Response:
    """Have a disk attached to a machine."""
    key = visit.path("machine")
    operation = await visit.submit(
        made(
            requests.AttachDisk,
            machine=key,
            disk=visit.form.raw("disk"),
            bus=visit.form.text("bus"),
            readonly=visit.form.flag("readonly"),
        )
    )
    return visit.went_on(operation, f"/ui/machines/{key}")
