"""Findings about real guests on QEMU: their agents, clocks, disks and processes go wrong for real.

Tests that leave the guest as it was share one that has booted; what restarts it has one of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.integration.manager.observer.conftest import Watched, watched
from tests.needs import needs
from tests.store import IMAGE_STORE

from vmlab.guests.console import ConsoleChannel
from vmlab.guests.guest import Guest
from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home
from vmlab.machine.states import MachineState
from vmlab.manager.documents import FindingDocument
from vmlab.manager.observer.checks import Thresholds
from vmlab.manager.observer.observer import Pace
from vmlab.manager.operator import attachments
from vmlab.manager.operator.disk_rows import disk_part
from vmlab.manager.requests import (
    DeleteDisk,
    DeleteMachine,
    DetachDisk,
    MachinePolicy,
    UpdateMachine,
)
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.queries import find_disk

pytestmark = [
    pytest.mark.boots,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs("qemu-system-x86_64"),
]

PATIENCE = 600.0
DEAD_SECONDS = 0.5
"""That a guest has to answer which is known to be dead: however long it had, it would not."""

MISMATCH = "machine-state-mismatch"
UNREACHABLE = "guest-agent-unreachable"

# All guests are asked, however young, by sweeps that the tests begin.
PACE = Pace(settle=0.01, guest_every=86400, guest_answers=PATIENCE, boots=0.0)

# init starts the agent anew when it has ended: here something that never answers. What is looked
# for has brackets, so that the shell that looks does not find itself.
BREAK = r"""cd /usr/lib/vmlab && mv agent agent.away
printf '#!/bin/sh\nexec sleep 987654\n' >agent && chmod +x agent
again=yes
while [ "$again" ]; do
    again=
    for process in /proc/[0-9]*; do
        case $(tr '\0' ' ' <$process/cmdline 2>/dev/null) in
            *vmla[b]/agent*) kill -9 ${process##*/}; again=yes ;;
        esac
    done
done"""
MEND = r"""cd /usr/lib/vmlab && mv agent.away agent
for process in /proc/[0-9]*; do
    case $(tr '\0' ' ' <$process/cmdline 2>/dev/null) in
        *'sleep 98765'[4]*) kill -9 ${process##*/} ;;
    esac
done"""


def run(settings: Settings, test: Callable[[Watched], Awaitable[None]]) -> None:
    """Run a coroutine function with a manager of that home."""

    async def whole() -> None:
        async with asyncio.timeout(3 * PATIENCE), watched(settings, pace=PACE) as manager:
            await test(manager)

    asyncio.run(whole())


async def boot(manager: Watched) -> None:
    await manager.machine_of(
        "web", host="qemu", image="debian-12-amd64-tiny", spec=None, memory="192M"
    )
    await guest_of(manager)


async def delete(manager: Watched) -> None:
    await manager.did(DeleteMachine(machine="web", force=True))
    await manager.nothing()


async def guest_of(manager: Watched) -> Guest:
    """The guest, when it answers."""
    return await manager.manager.guests.get((await manager.machine("web")).id, timeout=PATIENCE)


async def says(manager: Watched, command: str) -> str:
    """What a command prints in the guest."""
    return (await (await guest_of(manager)).succeed(command)).stdout.strip()


async def boot_of(manager: Watched) -> str:
    """What tells a boot of the guest from every other one."""
    return await says(manager, "cat /proc/sys/kernel/random/boot_id")


@asynccontextmanager
async def console_of(manager: Watched) -> AsyncIterator[Guest]:
    """The guest by its serial console, which needs no agent."""
    machine = await manager.at_host("web")
    guest = Guest(machine, ConsoleChannel(machine.console))
    await guest.connect(timeout=PATIENCE)
    try:
        yield guest
    finally:
        await guest.channel.close()


async def kinds(manager: Watched) -> list[str]:
    """What was done, the last first."""
    return [each.kind for each in await manager.operations()]


async def policy(manager: Watched, **findings: Any) -> None:
    """Have findings of the machine's treated so from now on; underscores are hyphens."""
    by_code = {code.replace("_", "-"): each for code, each in findings.items()}
    await manager.did(UpdateMachine(machine="web", policy=MachinePolicy(findings=by_code)))


async def swept_and_repaired(manager: Watched) -> FindingDocument:
    """A sweep has one finding repaired by itself, which works; that finding."""
    before = len(await manager.operations())
    await manager.sweep()
    repair, *_ = done = await manager.operations()
    assert len(done) == before + 1
    assert (repair.kind, repair.actor) == ("finding.repair", "observer")
    assert repair.target is not None
    ended = await manager.manager.operator.wait(repair.id, PATIENCE)
    assert ended.state == "succeeded", ended.error
    finding = await manager.finding(repair.target)
    assert (finding.policy, finding.operation) == ("reconcile", repair.id)
    assert finding.resolved is not None
    return finding


@pytest.fixture(scope="module")
def homes() -> Iterator[Callable[[], Settings]]:
    """Makes homes, which go when the tests here have ended."""
    with tempfile.TemporaryDirectory(prefix="vmh-") as directory, pytest.MonkeyPatch.context() as p:
        p.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
        p.setattr(attachments, "_GUEST_ANSWERS_S", PATIENCE)
        hosts = (HostSetting(name="qemu", hypervisor="qemu"),)

        def make() -> Settings:
            home = Home.open(Path(tempfile.mkdtemp(dir=directory)))
            return Settings(home=home, hosts=hosts, sweep_seconds=86400)

        yield make


@pytest.fixture(scope="module")
def shared(homes: Callable[[], Settings]) -> Iterator[Settings]:
    """Settings of a home with one machine, whose guest has booted."""
    settings = homes()
    run(settings, boot)
    yield settings
    run(settings, delete)


def test_a_clock_that_is_wrong_is_found_and_set(shared: Settings) -> None:
    async def test(manager: Watched) -> None:
        await manager.nothing()
        await says(manager, "date -s @1000000000")
        finding = await manager.found("clock-drift")
        assert finding.evidence["drift"] < -1e8
        await manager.repaired(finding, "reconcile")
        assert int(await says(manager, "date +%s")) > 1.7e9
        await manager.nothing()

    run(shared, test)


def test_an_agent_that_died_is_found_and_that_it_is_back(shared: Settings) -> None:
    async def test(manager: Watched) -> None:
        await manager.nothing()
        before, boot_id = await kinds(manager), await boot_of(manager)
        async with console_of(manager) as console:
            await console.succeed(BREAK)
        manager.manager.observer._eyes._guest_seconds = DEAD_SECONDS
        finding = await manager.found(UNREACHABLE)
        assert (finding.name, finding.severity, finding.policy) == ("web", "warning", "report")
        assert finding.evidence == {"problem": f"no answer for {DEAD_SECONDS:g} s", "host": "qemu"}
        assert finding.actions == ("reconcile",)
        assert (await manager.found(UNREACHABLE)).id == finding.id
        # It is told of, and that is all.
        assert await kinds(manager) == before
        assert await manager.state_at_host("web") is MachineState.RUNNING
        async with console_of(manager) as console:
            await console.succeed(MEND)
        manager.manager.observer._eyes._guest_seconds = PATIENCE
        await manager.nothing()
        done = await manager.finding(finding.id)
        assert done.resolved is not None
        assert done.operation is None
        assert await kinds(manager) == before
        assert await boot_of(manager) == boot_id

    run(shared, test)


def test_disks_that_were_unplugged_and_plugged_by_hand_are_found(shared: Settings) -> None:
    serials = "cat /sys/block/vd*/serial 2>/dev/null; true"

    async def test(manager: Watched) -> None:
        await guest_of(manager)
        disk = await manager.disk_of("data", "web")
        assert await says(manager, serials) == "data"
        machine = await manager.at_host("web")
        await machine.unplug_disk(disk.device)
        assert await says(manager, serials) == ""
        finding = await manager.found("disk-attachment-mismatch")
        assert (finding.subject, finding.evidence["direction"]) == (disk.id, "store")
        await manager.repaired(finding, "reconcile")
        assert await says(manager, serials) == "data"
        await manager.nothing()
        await manager.did(DetachDisk(disk="data"))
        part = await manager.manager.database.read(
            lambda s: disk_part(manager.manager.storage, find_disk(s, "data"))
        )
        await machine.plug_disk(part)
        finding = await manager.found("disk-attachment-mismatch")
        assert (finding.subject, finding.evidence["direction"]) == (disk.id, "world")
        await manager.repaired(finding, "reconcile")
        assert await says(manager, serials) == ""
        await manager.nothing()
        await manager.did(DeleteDisk(disk="data"))

    run(shared, test)


def test_a_guest_that_was_paused_by_hand_runs_on_under_reconcile(shared: Settings) -> None:
    async def test(manager: Watched) -> None:
        boot_id = await boot_of(manager)
        # Its clock stands still with it, and this takes as long as it takes.
        manager.manager.observer.thresholds = Thresholds(free_share=0.0, drift=3600)
        machine = await manager.at_host("web")
        await machine.pause()
        finding = await manager.found(MISMATCH)
        assert (finding.evidence["stored"], finding.evidence["seen"]) == ("running", "paused")
        assert finding.policy == "report"
        await policy(manager, machine_state_mismatch="reconcile")
        assert (await swept_and_repaired(manager)).id == finding.id
        assert await boot_of(manager) == boot_id
        await manager.nothing()
        await policy(manager)
        await (await guest_of(manager)).refresh()

    run(shared, test)


def test_a_guest_is_restarted_only_where_its_policy_says_so(homes: Callable[[], Settings]) -> None:
    async def process_of(manager: Watched) -> list[processes.OwnedProcess]:
        machine = await manager.at_host("web")
        return processes.adopt(machine.hypervisor.owner, machine.id)

    async def test(manager: Watched) -> None:
        await boot(manager)
        await manager.nothing()
        first = await boot_of(manager)
        (qemu,) = await process_of(manager)

        # Its agent dies, and it is to be restarted then.
        await policy(manager, guest_agent_unreachable="reconcile")
        async with console_of(manager) as console:
            await console.succeed(BREAK)
        manager.manager.observer._eyes._guest_seconds = DEAD_SECONDS
        assert (await swept_and_repaired(manager)).code == UNREACHABLE
        manager.manager.observer._eyes._guest_seconds = PATIENCE
        second = await boot_of(manager)
        assert second != first
        await manager.nothing()

        # QEMU is killed by hand: it is told of, and nothing else happens.
        await policy(manager)
        before = await kinds(manager)
        (qemu,) = await process_of(manager)
        os.kill(qemu.pid, signal.SIGKILL)
        await qemu.wait()
        finding = await manager.found(MISMATCH)
        assert (finding.evidence["stored"], finding.evidence["seen"]) == ("running", "failed")
        assert finding.policy == "report"
        assert (await manager.found(MISMATCH)).id == finding.id
        assert await kinds(manager) == before
        assert await process_of(manager) == []
        assert (await manager.machine("web")).state == "running"

        # The same under the other policy: it is restarted, and its guest boots.
        await policy(manager, machine_state_mismatch="reconcile")
        assert (await swept_and_repaired(manager)).id == finding.id
        assert await boot_of(manager) not in {first, second}
        await manager.nothing()
        await delete(manager)

    run(homes(), test)
