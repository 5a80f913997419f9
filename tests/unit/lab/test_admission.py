"""Machines wait for memory: in order, all at once, never for ever, and never more than there is."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.host_memory import HostMemory
from vmlab.hypervisors.processes import boot_id
from vmlab.hypervisors.records import read_document, write_document
from vmlab.lab import admission
from vmlab.lab.admission import Admission, Claim, Reservation
from vmlab.machine.errors import ResourceExhausted
from vmlab.machine.sizes import GIB, MIB

TOTAL = 8 * GIB
MARGIN = 512 * MIB


class Host:
    """A host with so much memory, of which other programs have some."""

    def __init__(self) -> None:
        self.others = 0
        self.used: dict[int, int] = {}

    def memory(self) -> HostMemory:
        return HostMemory(TOTAL, TOTAL - self.others - sum(self.used.values()))

    def used_by(self, machine: int | None, forked: bool) -> int:
        return 0 if machine is None else self.used.get(machine, 0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_POLLS", (0.001, 0.002))
    monkeypatch.setattr(admission, "_PATIENCE", 0.01)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def make(tmp_path: Path, host: Host) -> Callable[..., Admission]:
    def new(told: list[str] | None = None) -> Admission:
        return Admission(
            tmp_path / "ledger",
            tell=(told if told is not None else []).append,
            memory=host.memory,
            used=host.used_by,
        )

    return new


class Waiting:
    """A reservation that is asked for in a thread of its own, as by another process."""

    def __init__(self, lab: Admission, *claims: Claim, then: threading.Event | None = None) -> None:
        self.got: list[Reservation] | None = None
        self.refused: ResourceExhausted | None = None
        self.done = threading.Event()
        self._lab, self._claims, self._then = lab, claims, then
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.got = self._lab.reserve(self._claims)
        except ResourceExhausted as error:
            self.refused = error
        self.done.set()
        # A thread that has ended would be nobody.
        if self._then is not None:
            self._then.wait(60)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def over() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def waiters(tmp_path: Path) -> list[str]:
    return [
        entry["name"] for entry in read_document(tmp_path / "ledger" / "ledger.json")["waiters"]
    ]


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(60_000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it does not come to that")


def test_what_fits_is_let_in_and_what_does_not_waits_until_it_does(
    make: Any, tmp_path: Path, over: threading.Event
) -> None:
    told: list[str] = []
    first = make()
    held = first.reserve([Claim("one", 4 * GIB)])
    waiting = Waiting(make(told), Claim("two", 4 * GIB), then=over)
    until(lambda: bool(told))
    assert told == ["two waits for 4G of memory: 3584M is free, one may use 4G"]
    assert not waiting.done.is_set()
    first.release(*held)
    assert waiting.done.wait(60) and waiting.got is not None
    assert told[-1].startswith("two has its memory, after ")


def test_machines_that_have_not_used_their_memory_yet_are_counted_in_full(
    make: Any, host: Host, over: threading.Event
) -> None:
    lab = make()
    (one,) = lab.reserve([Claim("one", 6 * GIB)])
    host.used[17] = 5 * GIB
    lab.began(one, 17, forked=False)
    # 8 - 5 used - 1 promised - 0.5 for the host.
    assert make().reserve([Claim("fits", 3 * GIB // 2)])
    told: list[str] = []
    waiting = Waiting(make(told), Claim("no more", MIB), then=over)
    until(lambda: bool(told))
    lab.release(one)
    host.used.clear()
    assert waiting.done.wait(60) and waiting.got


def test_several_are_let_in_together_or_not_at_all(make: Any, tmp_path: Path) -> None:
    lab = make()
    lab.reserve([Claim("one", 4 * GIB)])
    with pytest.raises(ResourceExhausted, match=r"a, b waits for 4G .*nobody is going to give"):
        lab.reserve([Claim("a", 2 * GIB), Claim("b", 2 * GIB)])
    assert lab.reserve([Claim("a", 2 * GIB), Claim("b", GIB)])
    assert waiters(tmp_path) == []


def test_what_can_never_fit_is_refused_at_once(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="needs 8G of memory, and this host has 7680M"):
        make().reserve([Claim("huge", 8 * GIB)])
    limited = Admission(
        tmp_path, tell=[].append, memory=lambda: HostMemory(TOTAL, TOTAL, GIB, "/sys/fs/cgroup/x")
    )
    with pytest.raises(ResourceExhausted, match="limited by /sys/fs/cgroup/x"):
        limited.reserve([Claim("too much", GIB)])


def test_memory_of_other_programs_is_waited_for_and_not_for_ever(make: Any, host: Host) -> None:
    host.others = 7 * GIB
    with pytest.raises(ResourceExhausted, match="no machine has any") as caught:
        make().reserve([Claim("one", 4 * GIB)])
    assert "other programs" in str(caught.value.hint)


def test_a_small_one_does_not_overtake_a_large_one_that_came_first(
    make: Any, tmp_path: Path, over: threading.Event
) -> None:
    lab = make()
    held = lab.reserve([Claim("one", 4 * GIB)])
    large = Waiting(make(), Claim("large", 6 * GIB), then=over)
    until(lambda: waiters(tmp_path) == ["large"])
    told: list[str] = []
    small = Waiting(make(told), Claim("small", GIB), then=over)
    until(lambda: bool(told))
    assert told[0].endswith("before it: large")
    assert not small.done.is_set() and not large.done.is_set()
    lab.release(*held)
    assert large.done.wait(60) and small.done.wait(60)


def test_two_who_hold_and_wait_for_each_other_are_told_apart(
    make: Any, tmp_path: Path, over: threading.Event
) -> None:
    """One of them is refused, and the other one gets what that one gives back."""
    labs = [make(), make()]
    ready = threading.Barrier(2)
    refused: list[str] = []
    served: list[str] = []

    def test(number: int) -> None:
        lab = labs[number]
        mine = lab.reserve([Claim(f"first of {number}", 3 * GIB)])
        ready.wait(60)
        try:
            mine += lab.reserve([Claim(f"second of {number}", 3 * GIB)])
            served.append(f"{number}")
        except ResourceExhausted as error:
            refused.append(str(error.hint))
        lab.release(*mine)

    threads = [threading.Thread(target=test, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(served) == 1 and len(refused) == 1
    assert "all of them at once" in refused[0]


def test_who_is_behind_somebody_who_never_fits_is_served_when_all_wait(
    make: Any, tmp_path: Path, over: threading.Event
) -> None:
    holder = make()
    held = holder.reserve([Claim("held", 4 * GIB)])
    # Nobody holds anything but this thread, which is going to wait behind "large".
    large = Waiting(make(), Claim("large", 6 * GIB), then=over)
    until(lambda: waiters(tmp_path) == ["large"])
    more = holder.reserve([Claim("more", GIB)])
    assert not large.done.is_set()
    holder.release(*held, *more)
    assert large.done.wait(60)


def test_what_a_process_can_do_without_is_given_back_while_it_waits(make: Any) -> None:
    lab = make()
    spare = lab.reserve([Claim("template", 5 * GIB)])
    assert lab.reserve([Claim("one", 5 * GIB)], free_up=lambda: lab.release(*spare))


def test_the_dead_hold_nothing(make: Any, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        start = admission.ProcessIdentity.of(process.pid)
        assert start is not None
        entry = {"id": "x", "pid": process.pid, "start": start.start, "thread": 1, "name": "theirs",
                 "size": 6 * GIB, "machine": None, "forked": False}  # fmt: skip
        (tmp_path / "ledger").mkdir()
        write_document(
            tmp_path / "ledger" / "ledger.json",
            {"boot": boot_id(), "holders": [entry], "waiters": [entry | {"id": "y", "thread": 2}]},
        )
        told: list[str] = []
        waiting = Waiting(make(told), Claim("mine", 6 * GIB))
        until(lambda: bool(told))
        assert "theirs may use 6G; before it: theirs" in told[0]
        process.kill()
    waiting.join()
    assert waiting.got


@pytest.mark.parametrize("text", ["", "{}", '{"boot": "another", "holders": [], "waiters": []}'])
def test_a_ledger_that_says_nothing_of_now_is_begun_anew(
    make: Any, tmp_path: Path, text: str
) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.json").write_text(text)
    assert make().reserve([Claim("one", GIB)])


def test_a_lab_that_ends_holds_nothing(make: Any, tmp_path: Path) -> None:
    lab = make()
    lab.reserve([Claim("one", GIB), Claim("two", GIB)])
    lab.close()
    lab.close()
    assert read_document(tmp_path / "ledger" / "ledger.json")["holders"] == []


def test_an_interrupted_wait_is_no_wait_any_more(make: Any, tmp_path: Path) -> None:
    lab = make()
    lab.reserve([Claim("one", 7 * GIB)])

    def interrupt() -> None:
        assert waiters(tmp_path) == ["two"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.reserve([Claim("two", GIB)], free_up=interrupt)
    assert waiters(tmp_path) == []


HOLDS_MEMORY = """
import mmap, sys
own, shared = (mmap.mmap(-1, 64 << 20, flags=flag | mmap.MAP_ANONYMOUS)
               for flag in (mmap.MAP_PRIVATE, mmap.MAP_SHARED))
for memory in (own, shared):
    for page in range(0, 64 << 20, mmap.PAGESIZE):
        memory[page] = 1
print("held", flush=True)
sys.stdin.read()
"""


def test_the_memory_of_a_process_is_read_from_the_host() -> None:
    # Of a process that waits: what this one has changes from one look to the next.
    command = [sys.executable, "-c", HOLDS_MEMORY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        # The kernel counts pages in batches, and the interpreter has some, too.
        all_of_it = range(126 * MIB, 190 * MIB)
        what_it_wrote = range(63 * MIB, 126 * MIB)
        assert admission.used_by(process.pid, False) in all_of_it
        assert admission.used_by(process.pid, True) in what_it_wrote
        process.kill()
    assert admission.used_by(process.pid, False) == 0
    assert admission.used_by(None, False) == 0
    assert admission.used_by(1 << 30, False) == 0


def test_nothing_that_is_asked_for_is_nothing(make: Any, tmp_path: Path) -> None:
    lab = make()
    assert lab.reserve([]) == []
    assert not (tmp_path / "ledger").exists()
