"""The observer at work by itself: sweeps, rounds of guests, what is heard in between."""

from __future__ import annotations

import asyncio

from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor
from vmlab.machine.errors import OperationFailed, ResourceNotFound
from vmlab.machine.faults import CpuStall, KillFault
from vmlab.manager.observer.findings import documents
from vmlab.manager.observer.observer import Pace


async def until_told(watched, kind, act):
    """Do something, and wait for the event that comes of it."""
    waiting = asyncio.ensure_future(watched.told(kind))
    await asyncio.sleep(0)
    await act()
    return await waiting


def test_sweeps_find_what_nobody_tells_of_and_that_it_is_over(run):
    async def test(watched):
        path = watched.manager.storage.path("a" * 32, "raw")

        async def make():
            path.write_bytes(b"\0" * 512)

        async def remove():
            path.unlink()

        raised = await until_told(watched, "finding.raised", make)
        assert raised.data["code"] == "orphan-disk"
        resolved = await until_told(watched, "finding.resolved", remove)
        assert resolved.data["finding"] == raised.data["finding"]

    run(test, events=True, sweep_seconds=0.01)


def test_rounds_ask_guests_and_find_those_that_do_not_answer(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        await machine.inject(CpuStall(vcpu=0))
        await until_open(watched, ["guest-agent-unreachable"])
        # One that answers has as long as it needs.
        watched.manager.observer._eyes._guest_seconds = 120
        await machine.kill()
        await machine.start()
        await until_open(watched, [])

    # Where a guest that is well needs longer, once, that is found and over again.
    pace = Pace(settle=0.01, guest_every=0.01, guest_answers=0.5)
    run(test, events=True, pace=pace)


async def until_open(watched, codes):
    """Wait until findings of these codes are open, and no others."""
    found = None
    while found != codes:
        await asyncio.sleep(0.01)
        found = [each.code for each in await watched.manager.database.read(documents)]


def test_what_happens_to_one_machine_is_heard_without_a_look_at_the_others(run, monkeypatch):
    async def test(watched):
        for name in ("web", "db"):
            await watched.machine_of(name)
        # The first sweep, which looks at all of them, begins when the manager does.
        while not watched.manager.observer.sweeps:  # noqa: ASYNC110  # nobody tells of its end
            await asyncio.sleep(0.01)
        machine = await watched.at_host("web")
        other = type(await watched.at_host("db"))
        looked, status = [], other.status

        async def all_of_them():
            raise AssertionError("all machines were asked for")

        async def noted(self, **options):
            looked.append(self.name)
            return await status(self, **options)

        monkeypatch.setattr(machine.hypervisor, "list", all_of_them)
        monkeypatch.setattr(other, "status", noted)

        async def die():
            await machine.inject(KillFault())

        raised = await until_told(watched, "finding.raised", die)
        assert (raised.name, raised.data["code"]) == ("web", "machine-state-mismatch")
        assert set(looked) == {machine.name}

    run(test, events=True)


def test_after_events_that_are_not_kept_any_more_the_next_ones_are_heard(run, monkeypatch):
    followed, subscribe = [], OperatedHypervisor.subscribe

    def forgetful(self, since=None):
        followed.append(since)
        if since is not None:
            raise ResourceNotFound("events 1 to 7 are no longer kept")
        return subscribe(self, since)

    monkeypatch.setattr(OperatedHypervisor, "subscribe", forgetful)

    async def test(watched):
        await watched.machine_of("web")
        while None not in followed:
            await watched.sweep()
        machine = await watched.at_host("web")

        async def die():
            await machine.inject(KillFault())

        raised = await until_told(watched, "finding.raised", die)
        assert raised.name == "web"
        assert followed == [0, None]

    run(test, events=True)


def test_a_sweep_that_fails_is_not_the_last_one(run, monkeypatch):
    async def test(watched):
        observer = watched.manager.observer
        sweep, failures = observer._sweep, [OperationFailed("no luck"), ZeroDivisionError("a slip")]

        async def unlucky(asked):
            if failures:
                raise failures.pop(0)
            await sweep(asked)

        monkeypatch.setattr(observer, "_sweep", unlucky)
        path = watched.manager.storage.path("a" * 32, "raw")

        async def make():
            path.write_bytes(b"\0" * 512)

        await until_told(watched, "finding.raised", make)
        assert failures == []

    run(test, events=True, sweep_seconds=0.01)


def test_what_is_repaired_by_somebody_else_is_over_at_once(run):
    from vmlab.manager.requests import StartMachine

    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        waiting = asyncio.ensure_future(watched.told("finding.resolved"))
        await watched.sweep()
        # No sweep from here on: the end of the operation is heard.
        await watched.did(StartMachine(machine="web"))
        assert (await waiting).data["code"] == "machine-state-mismatch"

    run(test, events=True)


def test_closing_ends_all_that_it_does(run):
    async def test(watched):
        observer = watched.manager.observer
        await watched.machine_of("web")
        await watched.sweep()
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert any(name.startswith("observer") for name in names)
        await observer.close()
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not any(name.startswith("observer") for name in names)

    run(test, events=True)
