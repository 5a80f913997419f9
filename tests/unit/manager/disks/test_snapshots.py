"""Snapshots by hand and by schedule, restored, expired; and machines that are copied and moved."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vmlab.machine.sizes import MIB
from vmlab.manager.requests import (
    AttachDisk,
    CloneMachine,
    CreateDisk,
    CreateMachine,
    CreateTemplate,
    DeleteMachine,
    DeleteSnapshot,
    DeleteTemplate,
    MachinePolicy,
    MigrateMachine,
    ResizeMachine,
    RestoreMachine,
    SnapshotMachine,
    StartMachine,
    StopMachine,
    UpdateMachine,
)
from vmlab.manager.settings import Limits
from vmlab.manager.store import queries
from vmlab.manager.store.tables import MachineRow, SnapshotRow

Tell = Callable[..., None]


async def snapshots(asking: Any, machine: str) -> list[str]:
    """The names of a machine's snapshots by the store's word, and by its hypervisor's."""
    kept = await asking.manager.database.read(
        lambda s: [row.name for row in queries.find_machine(s, machine).snapshots]
    )
    found = await asking.manager.machine((await asking.machine(machine)).id)
    assert sorted(each.name for each in await found.snapshots()) == sorted(kept)
    return list(kept)


def test_snapshot_of_a_live_machine_brings_it_back_as_it_was(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one", start=True)
        hardware = await asking.guest("one")
        hardware.write_disk("root", 0, b"before")
        told = await asking.do(SnapshotMachine(machine="one", name="good"))
        assert told["memory"] is True
        hardware.write_disk("root", 0, b"after!")
        await asking.do(StopMachine(machine="one"))
        await asking.do(RestoreMachine(machine="one", snapshot="good"))
        machine = await asking.machine("one")
        assert (machine.state, machine.wanted) == ("running", "running")
        assert (await asking.guest("one")).read_disk("root", 0, 6) == b"before"
        error = await asking.refuse(SnapshotMachine(machine="one", name="good"))
        assert "has a snapshot 'good' already" in error.message
        await asking.do(DeleteSnapshot(machine="one", name="good"))
        assert await snapshots(asking, "one") == []
        error = await asking.refuse(RestoreMachine(machine="one", snapshot="good"))
        assert "there is no snapshot 'good'" in error.message
        for kind in ("taken", "restored", "deleted"):
            (told,) = await asking.events(f"snapshot.{kind}")
            assert told["snapshot"] == "good"

    tell(story)


def test_snapshot_at_rest_has_no_disks_of_the_store_and_puts_them_back(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        await asking.do(SnapshotMachine(machine="one", name="empty"))
        await asking.do(StartMachine(machine="one"))
        disk = await asking.disk("data")
        hardware = await asking.guest("one")
        hardware.write_disk("root", 0, b"own")
        hardware.write_disk(disk.device, 0, b"the store's")
        error = await asking.refuse(SnapshotMachine(machine="one", name="live"))
        assert "(data)" in error.message
        await asking.do(StopMachine(machine="one"))
        await asking.do(RestoreMachine(machine="one", snapshot="empty"))
        assert (await asking.machine("one")).state == "stopped"
        await asking.do(StartMachine(machine="one"))
        hardware = await asking.guest("one")
        assert hardware.read_disk("root", 0, 3) == bytes(3)
        assert hardware.read_disk(disk.device, 0, 11) == b"the store's"
        assert (await asking.disk("data")).state == "attached"

    tell(story)


def test_disks_are_put_back_when_the_snapshot_fails(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        found = await asking.manager.machine((await asking.machine("one")).id)
        disk = await asking.disk("data")
        await found.unplug_disk(disk.device)
        await found.snapshot("theirs")
        said = await asking.fail(SnapshotMachine(machine="one", name="theirs"))
        assert "the store does not know" in said
        assert disk.device in [each.name for each in found.spec.disks]
        assert [each.name for each in await found.snapshots()] == ["theirs"]

    tell(story)


REFUSED: list[tuple[Any, str]] = [
    (SnapshotMachine(machine="one", name="a", memory=True), "cannot machine.snapshot"),
    (
        SnapshotMachine(machine="one", name="a", expires=datetime(2027, 1, 1)),
        "no time zone",
    ),
    (SnapshotMachine(machine="../x", name="a"), "there is no machine"),
    (DeleteSnapshot(machine="one", name="a"), "there is no snapshot 'a'"),
    (CloneMachine(machine="one", snapshot="a"), "there is no snapshot 'a'"),
    (ResizeMachine(machine="one"), "vcpus or memory"),
    (ResizeMachine(machine="one", memory=1000), "at least"),
    (MigrateMachine(machine="one", host="simulated"), "another host than 'simulated'"),
    (MigrateMachine(machine="one", host="nosuch"), "there is no host"),
    (MigrateMachine(machine="one", host="other", live=True), "created"),
    (CreateTemplate(name="t"), "either an image or a spec"),
    (CreateTemplate(name="t", spec={"memory": "wrong"}), "memory"),
    (DeleteTemplate(template="t"), "there is no template"),
]


def test_what_cannot_work_is_refused(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        for request, said in REFUSED:
            error = await asking.refuse(request)
            assert said in error.message

    tell(story)


def test_snapshot_without_memory_is_not_brought_back_under_a_running_machine(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(SnapshotMachine(machine="one", name="rest"))
        await asking.do(StartMachine(machine="one"))
        error = await asking.refuse(RestoreMachine(machine="one", snapshot="rest"))
        assert "stop the machine first" in (error.hint or "")

    tell(story)


def test_scheduled_snapshots_are_taken_at_their_time_and_the_newest_are_kept(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        policy = MachinePolicy(snapshot_every=timedelta(hours=1), snapshot_keep=2)
        await asking.create("one", policy=policy)
        await asking.create("two")
        await asking.do(SnapshotMachine(machine="one", name="mine"))
        schedules, operator = asking.manager.schedules, asking.manager.operator
        # It looks at what is due by itself, too, and would remove what is too much here.
        await schedules.close()
        begun = (await asking.machine("one")).created
        assert await schedules.tick(begun) == begun + timedelta(hours=1)

        async def passed(hours: int) -> None:
            """Have what is due done, as if that time were over."""
            moment = begun + timedelta(hours=hours, minutes=1)
            await schedules.tick(moment)
            pending = await asking.manager.database.read(
                lambda s: queries.list_operations(s, limit=100)
            )
            for operation in pending.items:
                await operator.wait(operation.id, 120)

            def age(session: Any) -> None:
                for row in session.query(SnapshotRow).filter(SnapshotRow.scheduled):
                    if f"{moment:%Y%m%dT%H%M%S}" in row.name:
                        row.created = moment

            await asking.manager.database.write(age)

        for hour in (1, 2, 3):
            await passed(hour)
        assert len(await snapshots(asking, "one")) == 4
        await passed(3)
        names = await snapshots(asking, "one")
        assert [name[:5] for name in names] == ["mine", "auto-", "auto-"]
        assert await snapshots(asking, "two") == []
        actors = await asking.manager.database.read(
            lambda s: {o.actor for o in queries.list_operations(s, limit=100).items}
        )
        assert actors == {"local", "schedule"}

    tell(story)


def test_snapshot_that_expires_goes_by_itself(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        soon = datetime.now(UTC) + timedelta(hours=1)
        await asking.do(SnapshotMachine(machine="one", name="passing", expires=soon))
        await asking.do(SnapshotMachine(machine="one", name="lasting"))
        assert await asking.manager.schedules.tick() == soon
        await asking.manager.schedules.tick(soon)
        latest = await asking.manager.database.read(
            lambda s: queries.list_operations(s, kind="snapshot.delete", limit=1).items[0].id
        )
        assert (await asking.manager.operator.wait(latest, 120)).state == "succeeded"
        assert await snapshots(asking, "one") == ["lasting"]

    tell(story)


def test_what_a_schedule_cannot_do_is_told_once(
    tell: Tell, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(asking: Any) -> None:
        policy = MachinePolicy(snapshot_every=timedelta(hours=1))
        await asking.create("one", policy=policy)
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        await asking.do(StartMachine(machine="one"))
        later = (await asking.machine("one")).created + timedelta(hours=2)
        for _ in range(2):
            await asking.manager.schedules.tick(later)
        assert len([r for r in caplog.records if "is refused" in r.message]) == 1
        assert await snapshots(asking, "one") == []

    tell(story)


def test_running_machine_is_forked_and_its_clone_is_another_one(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        one = await asking.create("one", start=True, labels={"kind": "web"})
        (await asking.guest("one")).write_disk("root", 0, b"shared")
        await asking.do(CloneMachine(machine="one", name="two"))
        two = await asking.machine("two")
        assert (two.state, two.wanted, two.labels) == ("running", "running", {"kind": "web"})
        assert two.id != one.id and two.nics[0].mac != one.nics[0].mac
        found = await asking.manager.machine(two.id)
        assert [nic.mac for nic in (await found.info()).nics] == [two.nics[0].mac]
        (await asking.guest("two")).write_disk("root", 0, b"second")
        assert (await asking.guest("one")).read_disk("root", 0, 6) == b"shared"
        await asking.do(DeleteMachine(machine="one", force=True))
        assert (await asking.machine("two")).state == "running"

    tell(story)


def test_machine_at_rest_is_cloned_without_disks_of_the_store(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        result = await asking.do(CloneMachine(machine="one"))
        name = (await asking.machine(result["machine"])).name
        assert name.startswith("one-")
        assert [each["name"] for each in (await asking.machine(name)).spec["disks"]] == ["root"]
        assert len((await asking.machine("one")).spec["disks"]) == 2
        assert await snapshots(asking, "one") == []
        await asking.do(StartMachine(machine=name))
        await asking.do(StartMachine(machine="one"))

    tell(story)


def test_clone_of_a_snapshot_is_what_the_machine_was(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one", start=True)
        (await asking.guest("one")).write_disk("root", 0, b"then")
        await asking.do(SnapshotMachine(machine="one", name="then"))
        (await asking.guest("one")).write_disk("root", 0, b"now!")
        await asking.do(CloneMachine(machine="one", name="two", snapshot="then"))
        assert (await asking.guest("two")).read_disk("root", 0, 4) == b"then"

    tell(story)


def test_clone_that_fails_leaves_nothing(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one", start=True)
        await asking.do(SnapshotMachine(machine="one", name="good"))
        found = await asking.manager.machine((await asking.machine("one")).id)
        await found.delete_snapshot("good")
        said = await asking.fail(CloneMachine(machine="one", name="two", snapshot="good"))
        assert "the hypervisor has no snapshot" in said
        left = await asking.manager.database.read(lambda s: [r.name for r in s.query(MachineRow)])
        assert left == ["one"]
        error = await asking.refuse(CloneMachine(machine="one", name="one"))
        assert "names are unique" in error.message
        # What the store has and the hypervisor has not can still be removed.
        said = await asking.fail(RestoreMachine(machine="one", snapshot="good"))
        assert "no snapshot 'good' any more" in said
        await asking.do(DeleteSnapshot(machine="one", name="good"))

    tell(story)


@pytest.mark.parametrize("live", [False, True])
def test_machine_moves_to_another_host_with_its_disks(tell: Tell, live: bool) -> None:
    async def story(asking: Any) -> None:
        before = await asking.create("one", start=live)
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        disk = await asking.disk("data")
        if live:
            hardware = await asking.guest("one")
            hardware.write_disk("root", 0, b"own")
            hardware.write_disk(disk.device, 0, b"the store's")
        result = await asking.do(MigrateMachine(machine="one", host="other"))
        assert (result["from"], result["host"]) == ("simulated", "other")
        after = await asking.machine("one")
        assert (after.id, after.host, after.state) == (before.id, "other", before.state)
        assert await (await asking.manager.hosts.get("simulated")).list() == []
        if live:
            hardware = await asking.guest("one")
            assert hardware.read_disk("root", 0, 3) == b"own"
            assert hardware.read_disk(disk.device, 0, 11) == b"the store's"
        assert (await asking.disk("data")).machine == "one"

    tell(story)


def test_machine_is_found_where_a_crash_left_it(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        machine = await asking.create("one", start=True)
        found = await asking.manager.machine(machine.id)
        # It arrived, and the manager died before it could say so.
        await found.migrate(await asking.manager.hosts.get("other"))
        asking.manager.forget_machine(machine.id)
        await asking.do(MigrateMachine(machine="one", host="other"))
        after = await asking.machine("one")
        assert (after.host, after.state) == ("other", "running")

    tell(story)


def test_machine_gets_another_size_at_rest_and_while_it_runs(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(ResizeMachine(machine="one", vcpus=2, memory=128 * MIB))
        machine = await asking.machine("one")
        assert (machine.vcpus, machine.memory) == (2, 128 * MIB)
        await asking.do(StartMachine(machine="one"))
        await asking.do(ResizeMachine(machine="one", vcpus=3))
        assert (await asking.guest("one")).vcpus == 3
        error = await asking.refuse(ResizeMachine(machine="one", memory=512 * MIB))
        assert "no room" in error.message
        await asking.do(ResizeMachine(machine="one", memory=256 * MIB))
        assert (await asking.machine("one")).memory == 256 * MIB

    tell(story, limits=Limits(memory=256 * MIB))


def test_templates_are_kept_while_machines_are_made_of_them(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.do(CreateTemplate(name="small", spec={"memory": "64M"}, memory=64 * MIB))
        error = await asking.refuse(CreateTemplate(name="small", image="debian"))
        assert "there is a template" in error.message
        await asking.do(CreateMachine(name="one", template="small", host="simulated"))
        assert (await asking.machine("one")).memory == 64 * MIB
        error = await asking.refuse(DeleteTemplate(template="small"))
        assert "one" in error.message
        await asking.do(DeleteMachine(machine="one"))
        await asking.do(DeleteTemplate(template="small"))
        assert len(await asking.events("template.deleted")) == 1

    tell(story)


def test_dry_runs_say_what_would_be_done(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(SnapshotMachine(machine="one", name="a"))
        await asking.do(CreateTemplate(name="t", spec={}))
        for request, steps in (
            (SnapshotMachine(machine="one", name="b"), ["snapshot"]),
            (RestoreMachine(machine="one", snapshot="a"), ["restore"]),
            (DeleteSnapshot(machine="one", name="a"), ["remove"]),
            (CloneMachine(machine="one", name="two"), ["copy"]),
            (MigrateMachine(machine="one", host="other"), ["migrate"]),
            (ResizeMachine(machine="one", vcpus=2, memory=128 * MIB), ["resize"]),
            (CreateTemplate(name="u", spec={}), ["keep"]),
            (DeleteTemplate(template="t"), ["remove"]),
        ):
            operation = await asking.ask(request, dry_run=True)
            assert [step.name for step in operation.steps] == steps
        assert await snapshots(asking, "one") == ["a"]
        machine = await asking.machine("one")
        assert (machine.host, machine.vcpus) == ("simulated", 1)

    tell(story)


def test_policy_that_is_changed_changes_the_schedule(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        machine = await asking.create("one")
        assert await asking.manager.schedules.tick() is None
        policy = MachinePolicy(snapshot_every=timedelta(days=1))
        await asking.do(UpdateMachine(machine="one", policy=policy))
        assert await asking.manager.schedules.tick() == machine.created + timedelta(days=1)

    tell(story)
