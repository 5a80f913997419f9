"""Machines from templates and images, and what becomes of those whose making or ending fails."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from vmlab.images.errors import ImageError
from vmlab.images.progress import ProgressEvent
from vmlab.machine.errors import HypervisorUnavailable, MachineNotFound, VmlabError
from vmlab.machine.spec import MachineSpec
from vmlab.manager.manager import Manager
from vmlab.manager.operator import creation
from vmlab.manager.requests import (
    CreateMachine,
    CreateTemplate,
    DeleteMachine,
    PauseMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.settings import HostSetting

SPEC = {"memory": "64M"}
IMAGE = "debian-13-riscv64-tiny"


def test_a_machine_is_what_its_template_says_but_for_what_was_asked_for(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(
                manager,
                CreateTemplate(
                    name="small", image=IMAGE, vcpus=2, memory="96M", labels={"a": "1", "b": "2"}
                ),
            )
            await doing.did(
                manager, CreateTemplate(name="bare", memory="64M", spec={"display": True})
            )
            await doing.did(
                manager,
                CreateMachine(name="one", template="small", memory="128M", labels={"b": "3"}),
            )
            one = await doing.machine(manager, "one")
            assert (one.template, one.image, one.vcpus) == ("small", IMAGE, 2)
            assert (one.memory, one.architecture) == (128 << 20, "riscv64")
            assert one.labels == {"a": "1", "b": "3"}
            await doing.did(manager, CreateMachine(name="two", template="bare", start=True))
            two = await doing.machine(manager, "two")
            assert two.spec["display"] is True
            with pytest.raises(VmlabError, match="nothing"):
                await manager.operator.submit(CreateMachine(template="nothing"))
            with pytest.raises(ImageError):
                await manager.operator.submit(CreateMachine(image="nothing"))

    asyncio.run(story())


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are had also for the guests of the simulator."""
    monkeypatch.setattr(creation, "SIMULATED", "nothing")
    monkeypatch.setattr(creation, "_TELL_S", 0.01)


def test_how_far_an_image_is_is_told_and_the_machine_boots_it(
    place: Any, doing: Any, real: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    def bootable(spec: MachineSpec, image: str, *, hostname: str, progress: Any) -> MachineSpec:
        progress(ProgressEvent("fetching it", 1, 4))
        assert told.wait(120)
        progress(ProgressEvent("fetching it", 4, 4, finished=True))
        return spec.with_changes(labels={"image": image, "hostname": hostname}, boot={})

    monkeypatch.setattr(creation, "bootable", bootable)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(CreateMachine(name="web", image=IMAGE))

            async def seen() -> bool:
                document = await manager.operator.document(operation.id)
                return (document.message, document.progress) == ("fetching it", 0.125)

            await doing.eventually(seen, "it tells how far it is")
            told.set()
            ended = await manager.operator.wait(operation.id, 120)
            assert ended.state == "succeeded", ended.error
            machine = await doing.machine(manager, "web")
            assert machine.spec["labels"] == {"image": IMAGE, "hostname": "web"}

    asyncio.run(story())


def test_a_creation_that_is_cancelled_waits_for_no_image_and_leaves_nothing(
    place: Any, doing: Any, real: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = threading.Event()

    def bootable(spec: MachineSpec, image: str, *, hostname: str, progress: Any) -> MachineSpec:
        while True:
            progress(ProgressEvent("building it"))
            building.set()

    monkeypatch.setattr(creation, "bootable", bootable)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(CreateMachine(name="web", image=IMAGE))
            assert await asyncio.to_thread(building.wait, 120)
            await manager.operator.cancel(operation.id)
            assert (await manager.operator.wait(operation.id, 120)).state == "cancelled"
            with pytest.raises(MachineNotFound):
                await doing.machine(manager, "web")

    asyncio.run(story())


def test_one_that_waits_and_is_cancelled_gives_its_name_back(place: Any, doing: Any) -> None:
    place.hosts = {"slow": "[latency]\nvariability = 0\ncreate = 3600"}

    async def story() -> None:
        async with place.manager(workers=1) as manager:
            first = await manager.operator.submit(CreateMachine(name="a", spec=SPEC))
            second = await manager.operator.submit(CreateMachine(name="b", spec=SPEC))
            for operation in (second, first):
                await manager.operator.cancel(operation.id)
                assert (await manager.operator.wait(operation.id, 120)).state == "cancelled"
            for name in "ab":
                with pytest.raises(MachineNotFound):
                    await doing.machine(manager, name)
            assert await doing.at_hypervisors(manager) == {}

    asyncio.run(story())


def test_a_start_that_is_cancelled_leaves_the_machine_as_it_was(place: Any, doing: Any) -> None:
    place.hosts = {"slow": "[latency]\nvariability = 0\ncreate = 0\nkill = 0\nstart = 3600"}

    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            operation = await manager.operator.submit(StartMachine(machine="web"))

            async def boots() -> bool:
                return "starting" in (await doing.at_hypervisors(manager)).values()

            await doing.eventually(boots, "it boots")
            await manager.operator.cancel(operation.id)
            assert (await manager.operator.wait(operation.id, 120)).state == "cancelled"
            machine = await doing.machine(manager, "web")
            assert (machine.state, machine.wanted) == ("created", "stopped")

    asyncio.run(story())


def test_what_fails_leaves_the_state_that_the_hypervisor_tells(place: Any, doing: Any) -> None:
    place.hosts = {"bad": "[luck]\nfailures = { pause = 1.0, delete = 1.0 }"}

    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
            assert (await doing.do(manager, PauseMachine(machine="web"))).state == "failed"
            machine = await doing.machine(manager, "web")
            assert (machine.state, machine.wanted) == ("running", "running")
            await doing.did(manager, StopMachine(machine="web"))
            assert (await doing.do(manager, DeleteMachine(machine="web"))).state == "failed"
            machine = await doing.machine(manager, "web")
            assert machine.state == "failed"
            assert "could not be deleted" in machine.reason

    asyncio.run(story())


def test_a_machine_that_its_hypervisor_lost_can_be_stopped_and_deleted_but_not_started(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
            machine = await doing.machine(manager, "web")
            await (await manager.machine(machine.id)).delete(force=True)
            manager.forget_machine(machine.id)
            stopped = await doing.did(manager, StopMachine(machine="web"))
            assert stopped.result == {"how": ""}
            started = await doing.do(manager, StartMachine(machine="web"))
            assert started.state == "failed"
            assert (await doing.machine(manager, "web")).state == "failed"
            await doing.did(manager, DeleteMachine(machine="web"))

    asyncio.run(story())


# ------------------------------------------------------------------------ hosts, the manager


def test_a_host_whose_hypervisor_is_not_there_is_told_and_cannot_be_used(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        settings = place.make()
        hosts = (*settings.hosts, HostSetting(name="odd", hypervisor="nonesuch"))
        async with place.manager(hosts=hosts) as manager:
            await manager.hosts.probed()
            odd = await manager.hosts.document("odd")
            assert not odd.available
            assert "nonesuch" in odd.reason
            with pytest.raises(HypervisorUnavailable, match="nonesuch"):
                await manager.operator.submit(CreateMachine(spec=SPEC, host="odd"))
            assert (await manager.hosts.document("simulated")).available

    asyncio.run(story())


def test_what_a_host_of_this_computer_says_by_errors_of_the_system_counts_too(place: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            for _ in range(3):
                with pytest.raises(HypervisorUnavailable, match="does not answer: broken"):
                    async with manager.hosts.guarded("simulated"):
                        raise ConnectionError("broken")
            with pytest.raises(HypervisorUnavailable, match="left alone"):
                async with manager.hosts.guarded("simulated"):
                    raise AssertionError("nobody gets here")

    asyncio.run(story())


def test_without_settings_there_is_a_host_for_each_hypervisor(place: Any) -> None:
    async def story() -> None:
        async with place.manager(hosts=None) as manager:
            assert list(manager.hosts.names) == ["embedded", "qemu", "simulated"]
            # What is tried to find out what works ends before this does.
            await manager.hosts.probed()
            assert (await manager.hosts.document("simulated")).available

    asyncio.run(story())


def test_a_home_whose_lock_cannot_be_had_is_said_so(place: Any) -> None:
    async def story() -> None:
        settings = place.make()
        await asyncio.to_thread((settings.directory / "manager.lock").mkdir)
        with pytest.raises(VmlabError, match="cannot be opened"):
            await Manager.open(settings)

    asyncio.run(story())


def test_a_manager_one_part_of_which_does_not_begin_lets_go_of_everything(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async def no(*args: object) -> None:
            raise VmlabError("no networks today")

        with monkeypatch.context() as patch:
            patch.setattr("vmlab.manager.networks.networks.Networks.start", no)
            with pytest.raises(VmlabError, match="no networks today"):
                async with place.manager():
                    pass
        async with place.manager():
            pass

    asyncio.run(story())
