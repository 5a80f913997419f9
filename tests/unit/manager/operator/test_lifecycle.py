"""Machines made, started, stopped, changed and removed by operations, on simulated hosts."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from vmlab.machine.errors import (
    InvalidSpec,
    InvalidState,
    MachineNotFound,
    ResourceExhausted,
    UnsupportedOperation,
)
from vmlab.machine.faults import KillFault
from vmlab.manager.documents import OperationDocument
from vmlab.manager.requests import (
    CreateMachine,
    CreateNetwork,
    DeleteMachine,
    DeleteNetwork,
    MachinePolicy,
    Metadata,
    NewNic,
    PauseMachine,
    RestartMachine,
    ResumeMachine,
    StartMachine,
    StopMachine,
    UpdateMachine,
)
from vmlab.manager.store.changes import Conflict, PreconditionFailed

SPEC = {"memory": "64M"}


def steps(operation: OperationDocument) -> dict[str, str]:
    return {step.name: step.state for step in operation.steps}


def test_a_machine_is_made_started_paused_resumed_restarted_stopped_and_removed(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            made = await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            machine = await doing.machine(manager, "web")
            assert (made.target, made.target_name) == (machine.id, "web")
            assert (machine.state, machine.wanted) == ("created", "stopped")
            at = f"m-{machine.id[:12]}"
            for request, state, wanted in (
                (StartMachine(machine="web"), "running", "running"),
                (PauseMachine(machine="web"), "paused", "paused"),
                (ResumeMachine(machine=machine.id), "running", "running"),
                (RestartMachine(machine="web"), "running", "running"),
                (RestartMachine(machine="web", graceful=False), "running", "running"),
                (StopMachine(machine="web"), "stopped", "stopped"),
                (StartMachine(machine="web"), "running", "running"),
                (StopMachine(machine="web", graceful=False), "stopped", "stopped"),
            ):
                await doing.did(manager, request)
                machine = await doing.machine(manager, "web")
                assert (machine.state, machine.wanted) == (state, wanted), request
                assert machine.operation is None
                assert await doing.at_hypervisors(manager) == {at: state}
            await doing.did(manager, DeleteMachine(machine="web"))
            assert await doing.at_hypervisors(manager) == {}
            with pytest.raises(MachineNotFound):
                await doing.machine(manager, "web")

    asyncio.run(story())


def test_one_operation_makes_and_starts_a_machine_with_what_was_asked_for(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            request = CreateMachine(
                spec=SPEC,
                vcpus=2,
                memory="128M",
                nics=(NewNic(), NewNic(network="none", name="quiet", mac="52:54:00:AA:00:01")),
                labels={"team": "blue"},
                policy=MachinePolicy(autostart=True),
                metadata=Metadata(hostname="www"),
                start=True,
            )
            made = await doing.did(manager, request)
            machine = await doing.machine(manager, made.target)
            assert machine.name.startswith("vm-")
            assert (machine.state, machine.vcpus, machine.memory) == ("running", 2, 128 << 20)
            assert machine.labels == {"team": "blue"}
            assert machine.policy.autostart
            assert machine.metadata.hostname == "www"
            assert [(nic.name, nic.network) for nic in machine.nics] == [
                ("net0", "user"),
                ("quiet", "none"),
            ]
            at = await manager.machine(machine.id)
            info = await at.info()
            assert (info.vcpus, info.memory) == (2, 128 << 20)
            assert [nic.mac for nic in info.nics] == [nic.mac for nic in machine.nics]
            assert machine.nics[1].mac == "52:54:00:aa:00:01"
            # The user's name is nowhere at the hypervisor.
            assert at.name == f"m-{machine.id[:12]}"

    asyncio.run(story())


def test_each_step_of_a_stop_is_told_and_the_mildest_that_works_is_the_last(
    place: Any, doing: Any
) -> None:
    place.hosts = {"simulated": "[latency]\nvariability = 0\nstart = 0\nstop = 3600\nkill = 0"}

    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="deaf", spec=SPEC, start=True))
            stopped = await doing.did(manager, StopMachine(machine="deaf", timeout=0.05))
            assert stopped.result == {"how": "kill"}
            assert steps(stopped) == {
                "claim": "done",
                "ask": "failed",
                "terminate": "failed",
                "kill": "done",
                "release": "done",
            }
            told = {step.name: step.data.get("passed", "") for step in stopped.steps}
            assert "did not shut down within 0.05 s" in told["ask"]
            assert "no process" in told["terminate"]
            assert (await doing.machine(manager, "deaf")).state == "stopped"

    asyncio.run(story())


@pytest.mark.parametrize("stays", [True, False])
def test_a_restart_of_a_guest_that_does_not_shut_down_is_a_reset_that_can_be_seen(
    place: Any, doing: Any, stays: bool
) -> None:
    times = f"start = 0\nstop = {3600 if stays else 0}\nkill = 0"
    place.hosts = {"simulated": f"[latency]\nvariability = 0\n{times}"}

    async def story() -> None:
        async with place.manager(stop_seconds=0.05 if stays else 3600) as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
            done = await doing.did(manager, RestartMachine(machine="web"))
            assert steps(done) == (
                {"restart": "failed", "reset": "done"}
                if stays
                else {"restart": "done", "reset": "skipped"}
            )
            if stays:
                assert "did not shut down within 0.05 s" in done.steps[0].data["passed"]
            assert (await doing.machine(manager, "web")).state == "running"
            assert list((await doing.at_hypervisors(manager)).values()) == ["running"]

    asyncio.run(story())


def test_what_is_planned_is_what_is_done(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            for request in (
                StartMachine(machine="web"),
                RestartMachine(machine="web"),
                RestartMachine(machine="web", graceful=False),
                PauseMachine(machine="web"),
                ResumeMachine(machine="web"),
                StopMachine(machine="web"),
                StartMachine(machine="web"),
                StopMachine(machine="web", graceful=False),
            ):
                planned = await doing.did(manager, request, dry_run=True)
                done = await doing.did(manager, request)
                assert list(steps(planned)) == list(steps(done)), request

    asyncio.run(story())


def test_a_guest_that_obeys_is_asked_only(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
            stopped = await doing.did(manager, StopMachine(machine="web"))
            assert stopped.result == {"how": "ask"}
            assert steps(stopped)["terminate"] == steps(stopped)["kill"] == "skipped"

    asyncio.run(story())


def test_a_machine_that_does_not_start_is_failed_with_the_reason_and_can_be_started_again(
    place: Any, doing: Any
) -> None:
    place.hosts = {
        "simulated": '[[faults.faults]]\nkind = "operation-failure"\noperation = "start"\n'
        'message = "no boot"\nwhen = { on = "nth", n = 1 }'
    }

    async def story() -> None:
        async with place.manager() as manager:
            made = await doing.do(manager, CreateMachine(name="web", spec=SPEC, start=True))
            assert made.state == "failed"
            assert made.error is not None
            machine = await doing.machine(manager, "web")
            assert machine.state == "failed"
            assert "no boot" in machine.reason
            assert machine.reason in str(made.error["message"])
            await doing.did(manager, StartMachine(machine="web"))
            assert (await doing.machine(manager, "web")).state == "running"
            assert (await doing.machine(manager, "web")).reason == ""

    asyncio.run(story())


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        ({"spec": {"host_devices": [{"name": "g", "kind": "gpu", "address": "01:00.0"}]}},
         UnsupportedOperation, "gpu-passthrough"),
        ({"spec": SPEC, "vcpus": 200}, ResourceExhausted, "vcpus|cpus"),
        ({"spec": {"memory": "12"}}, InvalidSpec, "memory"),
        ({"spec": {"boot": {"image": "x"}}}, InvalidSpec, "boot.image"),
        ({"spec": {"nics": [{"name": "n", "network": "bridge:br0"}]}}, InvalidSpec, "bridge:br0"),
        ({}, InvalidSpec, "image"),
        ({"spec": SPEC, "image": "debian"}, InvalidSpec, "image"),
    ],
)  # fmt: skip
def test_a_machine_that_cannot_work_is_refused_before_anything_is_there(
    place: Any, doing: Any, request_: dict[str, Any], error: type[Exception], says: str
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            with pytest.raises(error, match=says):
                await manager.operator.submit(CreateMachine(name="no", **request_))
            with pytest.raises(MachineNotFound):
                await doing.machine(manager, "no")
            assert manager.operator.idle

    asyncio.run(story())


def test_what_the_state_does_not_allow_is_refused_at_once(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            for refused in (StopMachine, PauseMachine, ResumeMachine, RestartMachine):
                with pytest.raises(InvalidState):
                    await manager.operator.submit(refused(machine="web"))
            await doing.did(manager, StartMachine(machine="web"))
            for refused in (StartMachine, ResumeMachine, DeleteMachine):
                with pytest.raises(InvalidState):
                    await manager.operator.submit(refused(machine="web"))
            await doing.did(manager, DeleteMachine(machine="web", force=True))

    asyncio.run(story())


def test_a_machine_that_ended_behind_the_managers_back_can_be_started(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
            machine = await doing.machine(manager, "web")
            await (await manager.machine(machine.id)).kill()
            assert (await doing.machine(manager, "web")).state == "running"
            await doing.did(manager, StartMachine(machine="web"))
            assert list((await doing.at_hypervisors(manager)).values()) == ["running"]

    asyncio.run(story())


def test_operations_on_a_machine_wait_for_each_other_and_are_looked_at_when_they_run(
    place: Any, doing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            submit = manager.operator.submit
            # None of them begins before the last one is in line: they would be refused at once.
            monkeypatch.setattr(manager.operator, "_open", False)
            queued = [
                await submit(CreateMachine(name="web", spec=SPEC)),
                await submit(StartMachine(machine="web")),
                await submit(PauseMachine(machine="web")),
                await submit(StartMachine(machine="web")),
                await submit(DeleteMachine(machine="web", force=True)),
            ]
            monkeypatch.setattr(manager.operator, "_open", True)
            manager.operator._pump()
            ended = [await manager.operator.wait(each.id, 120) for each in queued]
            assert [each.state for each in ended] == [
                "succeeded", "succeeded", "succeeded", "failed", "succeeded",
            ]  # fmt: skip
            assert ended[3].error is not None
            assert ended[3].error["kind"] == "InvalidState"
            assert ended[3].error["actual"] == "paused"
            spans = [(each.started, each.ended) for each in ended]
            assert all(one[1] <= two[0] for one, two in pairwise(spans))

    asyncio.run(story())


def test_names_are_unique_and_a_taken_one_is_a_conflict(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            await doing.did(manager, CreateMachine(name="db", spec=SPEC))
            with pytest.raises(Conflict, match="web"):
                await manager.operator.submit(CreateMachine(name="web", spec=SPEC))
            with pytest.raises(Conflict, match="web"):
                await manager.operator.submit(UpdateMachine(machine="db", name="web"))
            await doing.did(manager, DeleteMachine(machine="web"))
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))

    asyncio.run(story())


def test_a_change_of_what_is_known_needs_no_hypervisor_and_the_version_that_was_read(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            before = await doing.machine(manager, "web")
            change = UpdateMachine(
                machine="web", name="www", labels={"a": "b"}, metadata=Metadata(hostname="h")
            )
            done = await doing.did(manager, change, if_match=before.version)
            assert done.result == {"changed": ["name", "labels", "metadata"]}
            after = await doing.machine(manager, "www")
            assert (after.id, after.labels) == (before.id, {"a": "b"})
            assert after.policy == before.policy
            with pytest.raises(PreconditionFailed):
                await manager.operator.submit(
                    UpdateMachine(machine="www", labels={}), if_match=before.version
                )

    asyncio.run(story())


def test_a_creation_that_fails_leaves_nothing(place: Any, doing: Any) -> None:
    place.hosts = {"simulated": "[luck]\nfailures = { create = 1.0 }"}

    async def story() -> None:
        async with place.manager() as manager:
            made = await doing.do(manager, CreateMachine(name="web", spec=SPEC))
            assert made.state == "failed"
            assert steps(made) == {"register": "undone", "image": "skipped", "define": "undone"}
            with pytest.raises(MachineNotFound):
                await doing.machine(manager, "web")
            assert await doing.at_hypervisors(manager) == {}

    asyncio.run(story())


def test_a_machine_that_was_killed_can_be_started_again(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
            machine = await doing.machine(manager, "web")
            at = await manager.machine(machine.id)
            await at.inject(KillFault())

            async def failed() -> bool:
                return (await at.status()).state.value == "failed"

            await doing.eventually(failed, "killed")
            await doing.did(manager, StartMachine(machine="web"))

    asyncio.run(story())


def test_nics_on_networks_of_the_managers_have_addresses_while_the_machine_may_have_them(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateNetwork(name="lan", subnet="10.9.0.0/29"))
            for name, release in (("a", "stop"), ("b", "delete")):
                request = CreateMachine(
                    name=name,
                    spec=SPEC,
                    nics=(NewNic(network="lan"),),
                    policy=MachinePolicy(release_addresses=release),
                    metadata=Metadata(user_data="#cloud-config\n"),
                    start=True,
                )
                await doing.did(manager, request)
            a, b = [await doing.machine(manager, name) for name in "ab"]
            assert len({*a.nics[0].addresses, *b.nics[0].addresses}) == 2
            info = await (await manager.machine(a.id)).info()
            assert info.nics[0].network.startswith("segment:net-")
            assert [disk.name for disk in info.disks] == ["cidata"]
            for name in "ab":
                await doing.did(manager, StopMachine(machine=name))
            a, b = [await doing.machine(manager, name) for name in "ab"]
            assert (len(a.nics[0].addresses), len(b.nics[0].addresses)) == (0, 1)
            with pytest.raises(Conflict):
                await manager.operator.submit(DeleteNetwork(network="lan"))
            for name in "ab":
                await doing.did(manager, DeleteMachine(machine=name))
            await doing.did(manager, DeleteNetwork(network="lan"))

    asyncio.run(story())
