"""What the observer's eyes make of files, lease files, locks and turns."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmlab.guests import agent
from vmlab.guests.command import AgentRestarted
from vmlab.hypervisors.ownership import Home, Store
from vmlab.machine.errors import ChannelClosed
from vmlab.machine.states import MachineState
from vmlab.manager.observer.collect import files, guests, locks, networks
from vmlab.manager.observer.collect.hypervisors import Turns

ONE = "a" * 32


def test_turns_come_to_everybody_after_some_sweeps():
    turns, names = Turns(), [f"m-{number}" for number in range(7)]
    seen = [turns.next(names, 3) for _ in range(3)]
    assert [len(each) for each in seen] == [3, 3, 3]
    assert set().union(*seen) == set(names)
    assert turns.next(names, 100) == set(names)
    assert turns.next([], 3) == set()


def test_turns_go_on_where_the_last_one_was_removed():
    turns = Turns()
    assert turns.next(["a", "b", "c", "d"], 2) == {"a", "b"}
    assert turns.next(["a", "c", "d"], 2) == {"c", "d"}


def test_files_of_disks_tell_what_a_guest_would_see(tmp_path):
    (tmp_path / f"{ONE}.raw").write_bytes(b"\0" * 1024)
    header = b"QFI\xfb" + b"\0" * 20 + struct.pack(">Q", 1 << 30) + b"\0" * 64
    (tmp_path / f"{'b' * 32}.qcow2").write_bytes(header)
    (tmp_path / f"{'c' * 32}.qcow2").write_bytes(b"short")
    (tmp_path / f"{'d' * 32}.raw.part").write_bytes(b"half")
    (tmp_path / ".hidden").touch()
    (tmp_path / files.QUARANTINE).mkdir()
    found = {file.path.name[:5]: file for file in files.disk_files(tmp_path)}
    assert {name: (file.disk, file.size) for name, file in found.items()} == {
        "aaaaa": (ONE, 1024),
        "bbbbb": ("b" * 32, 1 << 30),
        "ccccc": ("c" * 32, None),
        "ddddd": ("d" * 32, None),
    }
    assert "qcow2" in found["ccccc"].problem
    assert files.disk_files(tmp_path / "missing") == []


def test_a_file_that_cannot_be_read_says_why(ordinary_user: Path):
    path = ordinary_user / f"{ONE}.raw"
    path.touch(mode=0o000)
    (found,) = files.disk_files(ordinary_user)
    assert (found.disk, found.size) == (ONE, None)
    assert "denied" in found.problem


def test_a_link_that_leads_nowhere_is_no_file(tmp_path):
    (tmp_path / f"{ONE}.raw").symlink_to(tmp_path / "nowhere")
    assert files.disk_files(tmp_path) == []


def test_file_systems_are_told_once_by_the_first_directory_on_them(tmp_path):
    (tmp_path / "below").mkdir()
    found = files.volumes([tmp_path / "missing", tmp_path, tmp_path / "below"])
    assert [volume.path for volume in found] == [tmp_path]
    assert 0 < found[0].free <= found[0].size


def test_leases_are_read_as_dnsmasq_writes_them(tmp_path):
    network = tmp_path / "networks" / ONE
    network.mkdir(parents=True)
    (network.parent / "switch").mkdir()
    lines = [
        "1763740000 52:54:00:AA:00:01 10.0.0.5 web 01:52:54:00:aa:00:01",
        "duid 00:01:00:01:2c:aa:bb:cc:52:54:00:00:00:01",
        "1763740000 1234567 fd00::5 web 00:01:00:01",
        "damaged",
    ]
    (network / "leases").write_text("\n".join(lines))
    directories = networks.network_directories(tmp_path)
    (lease,) = networks.leases_of(directories)
    assert (lease.network, lease.address, lease.mac) == (ONE, "10.0.0.5", "52:54:00:aa:00:01")
    assert networks.network_directories(tmp_path / "missing") == []


def test_locks_tell_who_holds_them_and_whom_they_name(tmp_path):
    store = Store.open(Home.open(tmp_path / "home"), "manager")
    place = store.directory / "machines" / "qemu" / ONE
    place.mkdir(parents=True)
    lock = place / "lock"
    lock.write_text(f"{os.getpid()}\n")
    own = tmp_path / "manager.lock"
    own.write_text("no number")
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = {each.path: each for each in locks.locks_of([store.owner], [own]) or []}
    assert (found[lock].holder, found[lock].ours, found[lock].machine) == (os.getpid(), True, ONE)
    assert (found[lock].named, found[lock].alive) == (os.getpid(), True)
    assert (found[own].holder, found[own].named, found[own].machine) == (None, None, None)
    assert locks.locks_of([], [tmp_path / "missing"]) == []


# ------------------------------------------------------------------------ guests


class Agent:
    """A guest whose clock is so many seconds ahead, or that fails."""

    def __init__(self, ahead=0.0, status=0, fails=None, answers=True, restarted=0):
        self.ahead, self.status, self.fails, self.answers = ahead, status, fails, answers
        self.restarted = restarted

    async def ping(self):
        if self.fails is not None:
            raise self.fails
        if not self.answers:
            await asyncio.Event().wait()

    async def execute(self, command):
        import time

        assert command == "date +%s"
        if self.restarted:
            self.restarted -= 1
            raise AgentRestarted("the guest's agent died")
        return SimpleNamespace(status=self.status, stdout=f"{int(time.time() + self.ahead)}\n")


def machine_with(*channels, state=MachineState.RUNNING):
    hypervisor = SimpleNamespace(name="qemu")
    spec = SimpleNamespace(channels=channels)
    return SimpleNamespace(hypervisor=hypervisor, spec=spec, state=state)


def ask(guest, machine=None, timeout=60.0):
    async def guest_of(machine_id):
        assert machine_id == "one"
        return guest

    machine = machine or machine_with(agent.CONTROL)
    return asyncio.run(guests.asked("one", machine, guest_of, timeout))


@pytest.mark.parametrize("ahead", [0.0, 7200.0, -7200.0])
def test_an_agent_tells_how_far_its_clock_is_off(ahead):
    told = ask(Agent(ahead))
    assert told.answered
    assert abs(told.drift - ahead) <= told.uncertainty + 0.5


def test_an_agent_without_date_has_no_clock_and_answers():
    told = ask(Agent(status=127))
    assert (told.answered, told.drift) == (True, None)


def test_an_agent_that_was_started_anew_answers_and_one_that_dies_again_and_again_does_not():
    assert ask(Agent(restarted=1)).answered
    told = ask(Agent(restarted=2))
    assert (told.answered, told.problem) == (False, "the guest's agent died")


def test_an_agent_that_fails_or_says_nothing_does_not_answer():
    told = ask(Agent(fails=ChannelClosed("it is gone")))
    assert (told.answered, told.problem) == (False, "it is gone")
    told = ask(Agent(answers=False), timeout=0.01)
    assert (told.answered, told.problem) == (False, "no answer for 0.01 s")


def test_who_cannot_answer_is_not_asked():
    assert ask(Agent(), machine_with("other.port")) is None
    assert ask(Agent(), machine_with(agent.CONTROL, state=MachineState.PAUSED)) is None
