"""Templates without a guest: what has one, which key is whose, and how they come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.base import Snapshot
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.ownership import Run, Store
from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.images.image import Image
from vmlab.lab import templates as module
from vmlab.lab.boot import Bootable
from vmlab.lab.templates import MOST, Fork, Templates, key_of, template_spec, why_no_template
from vmlab.lab.venue import Venue
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import CorruptSnapshot, OperationFailed, UnsupportedOperation
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

IMAGE = Image("0" * 64, "tiny", Architecture.X86_64, Path("/"), {})


def wanted(name: str = "vm", **fields: Any) -> Bootable:
    spec = MachineSpec.of(
        name=name,
        architecture="x86_64",
        boot={"kernel": "/k", "cmdline": f"quiet vmlab.hostname={name} x"},
        **{"memory": "64M"} | fields,
    )
    return Bootable(spec, IMAGE, spec)


class Stage:
    """A simulated hypervisor, and guests that answer at once."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = run
        self.booted: list[str] = []
        self.capabilities = asyncio.run(self._hypervisor().capabilities())
        monkeypatch.setattr(module, "reached", self._reached)

    def _hypervisor(self) -> SimulatedHypervisor:
        return SimulatedHypervisor(self.run.owner, SimulationProfile.load("standard"), seed=1)

    def venue(self, *without: Capability) -> Venue:
        supported = self.capabilities.supported - set(without)
        why = dict(self.capabilities.unsupported) | dict.fromkeys(without, "not here")
        known = self.capabilities.model_copy(update={"supported": supported, "unsupported": why})
        return Venue(self._hypervisor(), known, None)  # type: ignore[arg-type]  # no loop is asked

    async def _reached(self, machine: Any, timeline: Any, patience: float) -> Any:
        self.booted.append(machine.name)

        class Answering:
            async def close(self) -> None:
                pass

        if patience == 0:
            raise OperationFailed("no guest")
        return Answering()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with Run.begin() as run:
        yield Stage(run, monkeypatch)


def play(work: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(work())


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"nics": [{"name": "n", "network": "tap:t"}]}, "only one tap:t"),
        ({"nics": [{"name": "n", "network": "bridge:b"}]}, "only one bridge:b"),
        ({"nics": [{"name": "n", "forwards": [{"guest": 1, "host": 2}]}]}, "port of this host"),
        ({"nics": [{"name": "n", "mac": "52:54:00:00:00:01"}]}, "address of its own"),
        ({"shares": [{"tag": "s", "source": "/", "target": "/s", "kind": "virtiofs"}]}, "virtiofs"),
        ({"deterministic": True}, "booted by itself"),
    ],
)
def test_what_there_is_only_one_of_has_no_template(
    stage: Stage, fields: dict[str, Any], why: str
) -> None:
    assert why in why_no_template(stage.venue(), wanted(**fields).spec)


def test_a_plain_machine_has_a_template(stage: Stage) -> None:
    spec = wanted(nics=[{"name": "n", "forwards": [{"guest": 1}]}, {"name": "m"}]).spec
    assert why_no_template(stage.venue(), spec) == ""


def test_a_hypervisor_that_cannot_fork_has_none_and_says_why(stage: Stage) -> None:
    venue = stage.venue(Capability.FORK)
    assert why_no_template(venue, wanted().spec) == "not here"
    shares = [{"tag": "s", "source": "/", "target": "/s"}]
    without = stage.venue(Capability.SHARE_9P)
    assert "9p" in why_no_template(without, wanted(shares=shares).spec)

    async def work() -> None:
        templates = Templates(venue)
        assert templates.lacks(wanted()) is None
        assert await templates.fork(wanted(), patience=1) == "not here"

    play(work)
    assert stage.booted == []


def test_a_store_has_none(stage: Stage) -> None:
    hypervisor = SimulatedHypervisor(
        Store.open(name="s").owner, SimulationProfile.load("standard"), seed=1
    )
    venue = stage.venue()
    kept = Venue(hypervisor, venue.capabilities, venue.loop)
    assert "outlive" in why_no_template(kept, wanted().spec)


def test_a_key_is_of_what_the_guest_can_tell_and_no_more(stage: Stage) -> None:
    venue = stage.venue()

    def key(bootable: Bootable, image: str = "0") -> str:
        return key_of(template_spec(bootable), image, venue)

    one = key(wanted("one"))
    assert key(wanted("two")) == one
    assert key(wanted("one", seed=9)) == one
    others = [
        key(wanted("one"), image="1"),
        key(wanted("one", memory="128M")),
        key(wanted("one", cpus=2)),
        key(wanted("one", disks=[{"name": "d", "size": "1M"}])),
        key(wanted("one", nics=[{"name": "n"}])),
        key(wanted("one", display=True)),
    ]
    assert len({one, *others}) == len(others) + 1
    assert template_spec(wanted("one")).boot.cmdline == "quiet vmlab.hostname=template x"


def test_one_boot_serves_all_who_want_the_same(stage: Stage) -> None:
    async def work() -> None:
        templates = Templates(stage.venue())
        key = templates.lacks(wanted())
        assert key == templates.key(wanted())
        made = await asyncio.gather(
            *(templates.fork(wanted(name), patience=1) for name in ("a", "b", "c"))
        )
        forks = [fork for fork in made if isinstance(fork, Fork)]
        assert [fork.machine.name for fork in forks] == ["a", "b", "c"]
        assert {fork.machine.state for fork in forks} == {MachineState.PAUSED}
        assert [len(fork.steps) for fork in forks].count(2) == 1
        assert templates.keys == {key} and templates.lacks(wanted()) is None
        assert await templates.discard(keep={key}) == 0
        assert await templates.discard() == 1
        assert templates.keys == frozenset() and templates.lacks(wanted()) == key

    play(work)
    assert len(stage.booted) == 1


def test_the_one_used_least_recently_goes_and_is_told(stage: Stage) -> None:
    gone: list[str] = []

    async def work() -> None:
        templates = Templates(stage.venue(), gone=gone.append)
        kinds = [wanted(f"m{number}", cpus=1 + number) for number in range(MOST + 1)]
        for kind in kinds:
            await templates.fork(kind, patience=1)
        assert gone == [templates.key(kinds[0])]
        assert len(templates.keys) == MOST

    play(work)


def test_a_template_that_does_not_boot_leaves_nothing_and_may_boot_later(stage: Stage) -> None:
    gone: list[str] = []

    async def work() -> None:
        venue = stage.venue()
        templates = Templates(venue, gone=gone.append)
        with pytest.raises(OperationFailed, match="no guest"):
            await templates.fork(wanted(), patience=0)
        assert await venue.hypervisor.list() == []
        assert gone == [templates.key(wanted())]
        assert isinstance(await templates.fork(wanted(), patience=1), Fork)

    play(work)


def test_one_that_turns_out_not_to_fork_is_not_tried_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        venue = stage.venue()
        templates = Templates(venue)

        async def refuse(self: Any, name: str, *, timeout: float | None = None) -> Any:
            raise UnsupportedOperation("fork", hypervisor="simulated", hint="its devices")

        monkeypatch.setattr("vmlab.hypervisors.operated_machine.OperatedMachine.fork", refuse)
        assert await templates.fork(wanted(), patience=1) == "its devices"
        assert await templates.fork(wanted(), patience=1) == "its devices"
        assert await venue.hypervisor.list() == []
        assert templates.lacks(wanted()) is None

    play(work)
    assert len(stage.booted) == 1


# ------------------------------------------------------------------- shared


class Filed:
    """Has simulated snapshots look as if they were files, which can be moved and damaged."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.used: list[Path] = []
        self.damaged = False
        filed = self
        take, make = OperatedMachine.snapshot, SimulatedHypervisor.create_from

        async def with_files(machine: Any, name: str, **options: Any) -> Snapshot:
            found = await take(machine, name, **options)
            directory = filed.place / found.machine
            directory.mkdir(parents=True)
            (directory / "memory").write_text("m")
            return found.model_copy(update={"directory": directory})

        async def of_files(hypervisor: Any, found: Snapshot, name: str, **options: Any) -> Any:
            assert found.directory is not None and (found.directory / "memory").exists()
            filed.used.append(found.directory)
            if filed.damaged:
                filed.damaged = False
                raise CorruptSnapshot("it is damaged")
            # In a process of its own it would have that name; here the first one has it.
            return await make(hypervisor, found, f"{name}-2", **options)

        monkeypatch.setattr(OperatedMachine, "snapshot", with_files)
        monkeypatch.setattr(SimulatedHypervisor, "create_from", of_files)


def test_the_second_process_makes_its_own_of_what_the_first_one_left(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filed = Filed(tmp_path / "files", monkeypatch)
    shared = tmp_path / "shared"

    async def work() -> None:
        venue = stage.venue()
        first, second = (Templates(venue, shared) for _ in range(2))
        one = await first.fork(wanted("one", nics=[{"name": "n"}]), patience=1)
        assert stage.booted and filed.used == []
        two = await second.fork(wanted("two", nics=[{"name": "n"}]), patience=1)
        assert isinstance(one, Fork) and isinstance(two, Fork)
        # The guest remembers the machine that was booted, and not the copy of it.
        assert two.macs == one.macs
        assert filed.used == [shared / first.key(wanted(nics=[{"name": "n"}])) / "snapshot"]

    play(work)
    assert not list((tmp_path / "files").iterdir())
    assert len(stage.booted) == 1


@pytest.mark.parametrize("how", ["record", "files"])
def test_what_was_left_damaged_is_booted_again(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    filed = Filed(tmp_path / "files", monkeypatch)
    shared = tmp_path / "shared"

    async def work() -> None:
        venue = stage.venue()
        first = Templates(venue, shared)
        await first.fork(wanted("one"), patience=1)
        await first.discard()
        (record,) = shared.glob("*/template.json")
        if how == "record":
            record.write_text("{")
        else:
            filed.damaged = True
        assert isinstance(await Templates(venue, shared).fork(wanted("two"), patience=1), Fork)
        assert "snapshot" in json.loads(record.read_text())

    play(work)
    assert len(stage.booted) == 2


def test_who_cannot_leave_one_as_files_keeps_it_for_itself(stage: Stage, tmp_path: Path) -> None:
    async def work() -> None:
        venue = stage.venue()
        made = await Templates(venue, tmp_path).fork(wanted("one"), patience=1)
        assert isinstance(made, Fork)
        (template,) = [each for each in await venue.hypervisor.list() if each.name != "one"]
        assert await template.snapshots() == []

    play(work)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]
