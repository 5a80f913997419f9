"""What the service offers, through the client, to the application itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.manager.client.conftest import SPEC, Story

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec, InvalidState, MachineNotFound, ResourceNotFound
from vmlab.machine.states import MachineState
from vmlab.manager import requests
from vmlab.manager.client import AsyncClient, Client
from vmlab.manager.service.listening import Listening
from vmlab.manager.service.serving import serve
from vmlab.manager.settings import Settings
from vmlab.manager.store.failures import Conflict, PreconditionFailed

Tell = Callable[[Story], None]


async def made(client: AsyncClient, name: str, **fields: object) -> None:
    await client.machines.create(name=name, spec=SPEC, host="simulated", **fields)


def test_a_machine_s_life(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        await made(client, "web", labels={"role": "web"}, start=True)
        machine = await client.machines.show("web")
        assert machine.state is MachineState.RUNNING
        assert (await client.machines.show(machine.id)).name == "web"
        await client.machines.pause("web")
        assert [each.name for each in await client.machines.list(state="paused")] == ["web"]
        await client.machines.resume("web")
        assert (await client.machines.metrics("web")).cpu.seconds >= 0
        assert isinstance(await client.machines.log("web"), bytes)
        await client.machines.snapshot("web", "before")
        assert [each.name for each in await client.machines.snapshots("web")] == ["before"]
        await client.machines.restart("web", graceful=False)
        await client.machines.restore("web", "before")
        await client.machines.delete_snapshot("web", "before")
        assert await client.snapshots.list() == ()
        await client.machines.stop("web", graceful=False)
        await client.machines.update("web", name="www", labels={})
        assert (await client.machines.show("www")).labels == {}
        await client.machines.resize("www", memory="128M")
        assert (await client.machines.show("www")).memory == 128 << 20
        await client.machines.delete("www")
        assert await client.machines.list() == ()

    tell(story)


def test_errors_are_those_of_the_manager(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        with pytest.raises(MachineNotFound):
            await client.machines.show("web")
        await made(client, "web")
        with pytest.raises(MachineNotFound) as missed:
            await client.machines.start("wed")
        assert "web" in (missed.value.hint or "")
        with pytest.raises(Conflict):
            await made(client, "web")
        with pytest.raises(InvalidState) as wrong:
            await client.machines.pause("web")
        assert wrong.value.actual == "created"
        with pytest.raises(PreconditionFailed):
            await client.submit(requests.StartMachine(machine="web"), if_match=999)
        with pytest.raises(ResourceNotFound):
            await client.operations.show("f" * 32)

    tell(story)


def test_a_wrong_field_is_refused_before_anything_is_sent(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        with pytest.raises(InvalidSpec) as refused:
            await client.machines.create(name="web", memory="512X", image="tiny")
        assert refused.value.problems[0].field == "memory"
        with pytest.raises(InvalidSpec):
            await client.disks.create("data", size="1G", colour="red")
        assert await client.operations.list() == ()

    tell(story)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        await made(client, "web")
        wanted = requests.StartMachine(machine="web")
        planned = await client.submit(wanted, dry_run=True)
        assert planned.dry_run
        assert planned.steps
        assert (await client.machines.show("web")).state is MachineState.CREATED

    tell(story)


def test_one_key_is_one_operation(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        wanted = requests.CreateDisk(name="data", size="16M")
        first = await client.submit(wanted, idempotency_key="once")
        second = await client.submit(wanted, idempotency_key="once")
        assert first.id == second.id
        assert len(await client.disks.list()) == 1

    tell(story)


def test_many_are_read_page_by_page(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        names = [f"d{number:02}" for number in range(7)]
        await asyncio.gather(*(client.disks.create(name, size="1M") for name in names))
        page = await client.disks.page(limit=3)
        assert len(page.items) == 3
        assert page.next is not None
        assert [disk.name async for disk in client.disks.each(limit=3)] == names

    tell(story)


def test_the_other_nouns(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        await client.templates.create("small", spec=SPEC, memory="64M")
        await client.machines.create(name="web", template="small", host="simulated")
        assert (await client.templates.show("small")).machines == 1
        await client.disks.create("data", size="16M")
        await client.disks.attach("data", "web")
        assert (await client.disks.show("data")).machine == "web"
        await client.disks.detach("data")
        await client.disks.resize("data", "32M")
        await client.disks.delete("data")
        await client.networks.create("lan", subnet="10.77.0.0/24")
        assert (await client.networks.show("lan")).used == 0
        assert await client.networks.addresses("lan") == ()
        await client.networks.delete("lan")
        assert "simulated" in [host.name for host in await client.hosts.list()]
        assert (await client.hosts.show("simulated")).available
        found = await client.findings.list(resolved=False)
        assert {finding.code for finding in found} <= {"storage-low"}  # which is the host's own
        kinds = {operation.kind for operation in await client.operations.list()}
        assert {"disk.attach", "network.create", "template.create"} <= kinds
        happened = await client.past_events(kind="disk.*")
        assert [event.kind for event in happened][:2] == ["disk.created", "disk.attached"]
        (last,) = await client.past_events(latest=True, limit=1, kind="disk.*")
        assert last == happened[-1]
        rest = await client.past_events(latest=True, before=last.id, kind="disk.*")
        assert (*rest, last) == happened
        assert (await client.health())["status"] == "ok"

    tell(story)


def test_tokens_are_told_once(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        issued = await client.tokens.create("laptop", scope="read", user="eve")
        assert issued.token.startswith("vml_")
        (listed,) = await client.tokens.list()
        assert (listed.id, listed.scope, listed.user) == (issued.id, "read", "eve")
        await client.tokens.revoke(issued.id)
        assert await client.tokens.list() == ()
        with pytest.raises(ResourceNotFound):
            await client.tokens.revoke(issued.id)

    tell(story)


def test_an_operation_that_nobody_waits_for_can_be_waited_for(tell: Tell) -> None:
    async def story(client: AsyncClient) -> None:
        taken = await client.disks.create("data", size="1M", wait=False)
        seen = []

        async def watch(operation: object) -> None:
            seen.append(operation)

        ended = await client.operations.wait(taken.id, watch=watch, timeout=120)
        assert ended.state == "succeeded"
        assert seen[-1] == ended

    tell(story)


def test_a_program_that_does_not_await(home: Home, tmp_path: Path) -> None:
    """The same methods, which return when done: here beside a manager in a loop of its own."""

    async def serving() -> None:
        ready = asyncio.Event()
        settings = Settings.from_environment(home=home)
        service = asyncio.ensure_future(
            serve(settings, Listening(), ready=lambda facts: ready.set())
        )
        try:
            await asyncio.wait_for(ready.wait(), 120)
            await asyncio.to_thread(program)
        finally:
            service.cancel()
            await asyncio.wait({service})

    def program() -> None:
        with Client.connect(home=home) as client:
            client.machines.create(name="web", spec=SPEC, host="simulated")
            assert client.machines.show("web").state is MachineState.CREATED
            with pytest.raises(MachineNotFound):
                client.machines.start("wed")
            operation = client.submit(requests.DeleteMachine(machine="web"))
            assert operation.state == "succeeded"
            kinds = []
            for event in client.events(0):
                kinds.append(event.kind)
                if event.kind == "machine.deleted":
                    break
            assert {"machine.created", "operation.queued", "operation.ended"} <= set(kinds)
            assert client.machines.list() == ()
            assert client.health()["status"] == "ok"

    asyncio.run(serving())


def test_both_clients_offer_the_same() -> None:
    from vmlab.manager.client import blocking, nouns

    apart = {"console", "command", "each"}  # what is made for `async with` and `async for`
    for name in ("Machines", "Disks", "Networks", "Templates", "Snapshots", "Hosts", "Findings",
                 "Operations", "Tokens"):  # fmt: skip
        awaited = {key for key in dir(getattr(nouns, name)) if not key.startswith("_")}
        waited = {key for key in dir(getattr(blocking, name)) if not key.startswith("_")}
        missing = awaited - waited - apart - {"word", "document", "paged"}
        if name == "Snapshots":
            missing -= {"show"}  # a snapshot has no path of its own
        assert missing == set(), name
