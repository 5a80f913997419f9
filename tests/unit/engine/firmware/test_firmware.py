"""The built-in SBI, called as S mode calls it, over harts that only take notes."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from vmlab.engine import firmware as sbi
from vmlab.engine.firmware import SUCCESS, Firmware
from vmlab.engine.memory.ram import RAM_BASE, Ram

MINUS_ONE = (1 << 64) - 1
NO = (1 << 64) + sbi.NOT_SUPPORTED
BAD = (1 << 64) + sbi.INVALID_PARAM
SIZE = 1 << 20


class NotedHart:
    def __init__(self, hart_id: int) -> None:
        self.hart_id = hart_id
        self.registers = [0] * 32
        self.csrs: dict[int, int] = {0x320: 0}

    def x(self, number: int) -> int:
        return self.registers[number]

    def set_x(self, number: int, value: int) -> None:
        assert 0 <= value <= MINUS_ONE
        self.registers[number] = value

    def read_csr(self, number: int) -> int:
        return self.csrs.get(number, 0)

    def write_csr(self, number: int, value: int) -> None:
        assert 0 <= value <= MINUS_ONE
        self.csrs[number] = value


class NotedHarts:
    def __init__(self, count: int) -> None:
        self.harts = [NotedHart(n) for n in range(count)]
        self.notes: list[tuple[object, ...]] = []
        self.every = False
        self.suspended: int | None = None

    def __len__(self) -> int:
        return len(self.harts)

    def set_pending(self, hart: int, bit: int, level: bool) -> None:
        self.notes.append(("pending", hart, bit, level))

    def start(self, hart: int, address: int, opaque: int) -> None:
        self.notes.append(("start", hart, address, opaque))

    def stop(self, hart: int) -> None:
        self.notes.append(("stop", hart))

    def tell_calls(self, every: bool) -> None:
        self.every = every

    def wait(self, hart: int) -> None:
        self.notes.append(("wait", hart))

    def suspend(self, hart: int, address: int, opaque: int) -> None:
        self.notes.append(("suspend", hart, address, opaque))

    def is_suspended(self, hart: int) -> bool:
        return hart == self.suspended

    def fence(
        self, harts: list[int], fence: sbi.Fence, start: int, size: int, asid: int | None
    ) -> None:
        self.notes.append(("fence", harts, fence, start, size, asid))


class Machine:
    def __init__(self, harts: int = 4) -> None:
        self.ram = Ram(SIZE)
        self.harts = NotedHarts(harts)
        self.ends: list[tuple[str, int]] = []
        self.printed = bytearray()
        self.typed = bytearray()
        self.firmware = Firmware(
            self.ram, self.harts, lambda kind, reason: self.ends.append((kind, reason)),
            self._write, self._read,
        )  # fmt: skip
        self.firmware.boot(self.harts.harts[0], RAM_BASE + 0x20_0000, RAM_BASE + 0x1000)
        self.harts.notes.clear()

    def _write(self, data: bytes) -> int:
        self.printed += data
        return len(data)

    def _read(self, size: int) -> bytes:
        data = bytes(self.typed[:size])
        del self.typed[: len(data)]
        return data

    def call(
        self, extension: int, function: int, *arguments: int, hart: int = 0
    ) -> tuple[int, int]:
        it = self.harts.harts[hart]
        before = [n * 0x0101 for n in range(32)]
        it.registers = list(before)
        for number, value in enumerate(arguments):
            it.registers[10 + number] = before[10 + number] = value
        it.registers[16] = before[16] = function
        it.registers[17] = before[17] = extension
        self.firmware.call(it)
        assert it.registers[:10] + it.registers[12:] == before[:10] + before[12:], (
            "all registers but a0 and a1 are kept (SBI 2.0, chapter 3)"
        )
        return it.registers[10], it.registers[11]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_the_first_hart_begins_and_the_others_wait() -> None:
    machine = Machine()
    machine.firmware.boot(machine.harts.harts[2], 0x8020_0000, 0x87E0_0000)
    assert machine.harts.notes == [("start", 2, 0x8020_0000, 0x87E0_0000)]
    assert [machine.call(sbi.HSM, 2, n, hart=2) for n in range(4)] == [
        (SUCCESS, 1), (SUCCESS, 1), (SUCCESS, 0), (SUCCESS, 1),
    ]  # fmt: skip


def test_base_says_what_there_is(machine: Machine) -> None:
    assert machine.call(sbi.BASE, 0) == (SUCCESS, 0x0200_0000)
    assert machine.call(sbi.BASE, 1) == (SUCCESS, sbi.IMPLEMENTATION)
    assert machine.call(sbi.BASE, 2) == (SUCCESS, 1)
    for extension in (0x10, 0x54494D45, 0x735049, 0x52464E43, 0x48534D, 0x53525354, 0x4442434E,
                      0x504D55):  # fmt: skip
        assert machine.call(sbi.BASE, 3, extension) == (SUCCESS, 1)
    for extension in (0, 1, 0x53555350, 0x4E41434C, MINUS_ONE):
        assert machine.call(sbi.BASE, 3, extension) == (SUCCESS, 0)
    machine.harts.harts[0].csrs |= {0xF11: 5, 0xF12: 6, 0xF13: 7}
    assert [machine.call(sbi.BASE, n)[1] for n in (4, 5, 6)] == [5, 6, 7]
    assert machine.call(sbi.BASE, 7)[0] == NO
    assert machine.call(0x1234, 0)[0] == NO


def test_the_timer_is_the_harts_own_comparator(machine: Machine) -> None:
    assert machine.call(sbi.TIME, 0, 123456789, hart=1) == (SUCCESS, 0)
    assert machine.harts.harts[1].csrs[0x14D] == 123456789
    assert machine.call(sbi.TIME, 1)[0] == NO


@pytest.mark.parametrize(
    ("mask", "base", "targets"),
    [
        (0b1, 0, [0]),
        (0b1010, 0, [1, 3]),
        (0b11, 2, [2, 3]),
        (0, 0, []),
        (0, MINUS_ONE, [0, 1]),
        (7, MINUS_ONE, [0, 1]),
    ],
)
def test_interrupts_reach_the_harts_of_the_mask(
    machine: Machine, mask: int, base: int, targets: list[int]
) -> None:
    machine.call(sbi.HSM, 0, 1, RAM_BASE, 0)
    machine.harts.notes.clear()
    assert machine.call(sbi.IPI, 0, mask, base) == (SUCCESS, 0)
    assert machine.harts.notes == [("pending", target, 1, True) for target in targets]


@pytest.mark.parametrize(("mask", "base"), [(1, 4), (0b10000, 0), (1 << 63, 0), (1, 1 << 63)])
def test_harts_that_do_not_exist_are_refused(machine: Machine, mask: int, base: int) -> None:
    assert machine.call(sbi.IPI, 0, mask, base)[0] == BAD
    assert machine.call(sbi.RFENCE, 1, mask, base, 0, 0)[0] == BAD
    assert machine.harts.notes == []
    assert machine.call(sbi.IPI, 1, 1, 0)[0] == NO


def test_fences_are_carried_out_on_the_harts_that_run(machine: Machine) -> None:
    for hart in (1, 2):
        machine.call(sbi.HSM, 0, hart, RAM_BASE, 0)
    machine.harts.notes.clear()
    assert machine.call(sbi.RFENCE, 0, 0b1111, 0) == (SUCCESS, 0)
    assert machine.call(sbi.RFENCE, 1, 0b0110, 0, 0x1000, 0x2000) == (SUCCESS, 0)
    assert machine.call(sbi.RFENCE, 2, 0b0001, 0, 0x1000, 0x2000, 0x1_0007) == (SUCCESS, 0)
    assert machine.call(sbi.RFENCE, 1, 0, MINUS_ONE, 0, 0) == (SUCCESS, 0)
    assert machine.harts.notes == [
        ("fence", [0, 1, 2], "fence.i", 0, MINUS_ONE, None),
        ("fence", [1, 2], "sfence.vma", 0x1000, 0x2000, None),
        ("fence", [0], "sfence.vma", 0x1000, 0x2000, 7),
        ("fence", [0, 1, 2], "sfence.vma", 0, MINUS_ONE, None),
    ]
    assert machine.call(sbi.RFENCE, 3, 1, 0)[0] == NO


def test_harts_are_started_stopped_and_asked_for(machine: Machine) -> None:
    assert machine.call(sbi.HSM, 0, 2, RAM_BASE + 0x1000, 77) == (SUCCESS, 0)
    assert machine.harts.notes == [("start", 2, RAM_BASE + 0x1000, 77)]
    assert machine.call(sbi.HSM, 2, 2) == (SUCCESS, sbi.STARTED)
    assert machine.call(sbi.HSM, 0, 2, RAM_BASE, 0)[0] == (1 << 64) + sbi.ALREADY_AVAILABLE
    assert machine.call(sbi.HSM, 0, 4, RAM_BASE, 0)[0] == BAD
    assert machine.call(sbi.HSM, 2, 4)[0] == BAD
    for address in (0, RAM_BASE + 1, RAM_BASE + SIZE, MINUS_ONE - 1):
        assert machine.call(sbi.HSM, 0, 3, address, 0)[0] == (1 << 64) + sbi.INVALID_ADDRESS
    machine.harts.notes.clear()
    it = machine.harts.harts[2]
    machine.call(sbi.HSM, 1, 5, 6, hart=2)
    assert it.registers[10:12] == [5, 6], "a call that does not return returns nothing"
    assert machine.harts.notes == [("stop", 2)]
    assert machine.call(sbi.HSM, 2, 2) == (SUCCESS, sbi.STOPPED)
    assert machine.call(sbi.HSM, 0, 2, RAM_BASE, 0)[0] == SUCCESS
    assert machine.call(sbi.HSM, 9)[0] == NO


def test_of_two_harts_that_start_the_same_one_at_once_one_is_told_that_it_was_late(
    machine: Machine,
) -> None:
    answers: list[int] = []

    def start(hart: int) -> None:
        answers.append(machine.call(sbi.HSM, 0, 2, RAM_BASE, hart, hart=hart)[0])

    other = threading.Thread(target=start, args=(1,))

    class Met(list[int]):
        """While the first hart looks whether it is stopped, the second one comes along."""

        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            if other.ident is None:
                other.start()
                other.join(0.2)
            return found

    machine.firmware.state.status = Met(machine.firmware.state.status)
    start(0)
    other.join()
    assert sorted(answers) == [SUCCESS, (1 << 64) + sbi.ALREADY_AVAILABLE]
    assert [note[0] for note in machine.harts.notes] == ["start"]


def test_a_hart_is_said_to_be_stopped_when_it_can_be_started(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way around, one that is started at once would be stopped after that."""
    machine.call(sbi.HSM, 0, 2, RAM_BASE, 0)
    said = []
    monkeypatch.setattr(
        machine.harts, "stop", lambda hart: said.append(machine.call(sbi.HSM, 2, hart))
    )
    machine.call(sbi.HSM, 1, hart=2)
    said.append(machine.call(sbi.HSM, 2, 2))
    assert said == [(SUCCESS, sbi.STARTED), (SUCCESS, sbi.STOPPED)]


def test_a_hart_suspends_and_wakes_where_it_asked_to(machine: Machine) -> None:
    assert machine.call(sbi.HSM, 3, 0, 0, 0) == (SUCCESS, 0)
    assert machine.harts.notes == [("wait", 0)]
    machine.harts.notes.clear()
    machine.call(sbi.HSM, 3, 0x8000_0000, RAM_BASE + 0x100, 99)
    assert machine.harts.notes == [("suspend", 0, RAM_BASE + 0x100, 99)]
    assert machine.call(sbi.HSM, 3, 0x8000_0000, 0, 99)[0] == (1 << 64) + sbi.INVALID_ADDRESS
    assert machine.call(sbi.HSM, 3, 5, 0, 0)[0] == BAD
    assert machine.call(sbi.HSM, 3, 0x1000_0000, 0, 0)[0] == NO


def test_a_suspended_hart_is_said_to_be(machine: Machine) -> None:
    machine.call(sbi.HSM, 0, 2, RAM_BASE, 0)
    machine.harts.suspended = 2
    assert machine.call(sbi.HSM, 2, 2) == (SUCCESS, sbi.SUSPENDED)
    assert machine.call(sbi.HSM, 0, 2, RAM_BASE, 0)[0] == (1 << 64) + sbi.ALREADY_AVAILABLE
    machine.call(sbi.HSM, 1, hart=2)
    assert machine.call(sbi.HSM, 2, 2) == (SUCCESS, sbi.STOPPED)


def test_the_machine_is_ended(machine: Machine) -> None:
    for kind, reason in ((0, 0), (1, 0), (2, 1)):
        machine.call(sbi.SRST, 0, kind, reason)
    assert machine.ends == [("poweroff", 0), ("reboot", 0), ("reboot", 1)]
    assert machine.call(sbi.SRST, 0, 3, 0)[0] == BAD
    assert machine.call(sbi.SRST, 0, 0, 2)[0] == BAD
    assert machine.call(sbi.SRST, 0, 0xF000_0000, 0)[0] == NO
    assert machine.call(sbi.SRST, 1, 0, 0)[0] == NO
    assert len(machine.ends) == 3


def test_the_debug_console_prints_and_reads_guest_memory(machine: Machine) -> None:
    machine.ram.write(RAM_BASE + 100, b"hello, console")
    assert machine.call(sbi.DBCN, 0, 5, RAM_BASE + 100, 0) == (SUCCESS, 5)
    assert machine.call(sbi.DBCN, 2, 0x121) == (SUCCESS, 0)
    assert machine.printed == b"hello!"
    machine.typed += b"typed"
    assert machine.call(sbi.DBCN, 1, 3, RAM_BASE + 200, 0) == (SUCCESS, 3)
    assert machine.call(sbi.DBCN, 1, 100, RAM_BASE + 203, 0) == (SUCCESS, 2)
    assert machine.call(sbi.DBCN, 1, 100, RAM_BASE + 203, 0) == (SUCCESS, 0)
    assert machine.ram.read(RAM_BASE + 200, 6) == b"typed\0"
    for size, low, high in ((1, 0, 0), (2, RAM_BASE + SIZE - 1, 0), (1, RAM_BASE, 1),
                            (MINUS_ONE, RAM_BASE, 0)):  # fmt: skip
        assert machine.call(sbi.DBCN, 0, size, low, high)[0] == BAD
        assert machine.call(sbi.DBCN, 1, size, low, high)[0] == BAD
    assert machine.call(sbi.DBCN, 3)[0] == NO


def test_hardware_counters_are_the_csrs(machine: Machine) -> None:
    assert machine.call(sbi.PMU, 0) == (SUCCESS, sbi.COUNTERS)
    assert machine.call(sbi.PMU, 1, 0) == (SUCCESS, 0xC00 | 63 << 12)
    assert machine.call(sbi.PMU, 1, 1) == (SUCCESS, 0xC02 | 63 << 12)
    assert machine.call(sbi.PMU, 1, 2) == (SUCCESS, 1 << 63)
    assert machine.call(sbi.PMU, 1, sbi.COUNTERS)[0] == BAD
    it = machine.harts.harts[0]
    it.csrs |= {0x320: 0b101, 0xB02: 55}
    # Instructions, on whichever counter of the mask can; cleared and started.
    assert machine.call(sbi.PMU, 2, 0, 0b11, 6, 2, 0) == (SUCCESS, 1)
    assert it.csrs[0xB02] == 0
    assert it.csrs[0x320] == 0b001
    assert machine.call(sbi.PMU, 3, 1, 1, 0, 0)[0] == (1 << 64) + sbi.ALREADY_STARTED
    assert machine.call(sbi.PMU, 4, 1, 1, 0) == (SUCCESS, 0)
    assert it.csrs[0x320] == 0b101
    assert machine.call(sbi.PMU, 4, 1, 1, 0)[0] == (1 << 64) + sbi.ALREADY_STOPPED
    assert machine.call(sbi.PMU, 3, 1, 1, 1, 1000) == (SUCCESS, 0)
    assert it.csrs[0xB02] == 1000
    assert machine.call(sbi.PMU, 4, 1, 1, 1) == (SUCCESS, 0)
    assert machine.call(sbi.PMU, 3, 1, 1, 0, 0)[0] == BAD, "forgotten by RESET"
    assert machine.call(sbi.PMU, 2, 0, 0b01, 0, 2, 0)[0] == NO, "cycles are no instructions"
    assert machine.call(sbi.PMU, 2, 0, 0b11, 0, 3, 0)[0] == NO, "there are no caches to miss"
    assert machine.call(sbi.PMU, 2, 0, 0, 0, 1, 0)[0] == BAD
    assert machine.call(sbi.PMU, 2, 0, 0b11, 0, 1 << 20, 0)[0] == BAD
    assert machine.call(sbi.PMU, 2, 0, 0b11, 1, 1, 0)[0] == BAD, "none was configured before"
    assert machine.call(sbi.PMU, 5, 0)[0] == BAD, "a hardware counter is read as a CSR"


def test_firmware_counters_count_calls(machine: Machine) -> None:
    everything = (1 << sbi.COUNTERS) - 1
    error, counter = machine.call(sbi.PMU, 2, 0, everything, 6, 15 << 16 | 5, 0)
    assert error == SUCCESS and counter >= 2
    assert machine.harts.every, "harts may send no interrupts by themselves"
    other = machine.call(sbi.PMU, 2, 0, everything, 6, 15 << 16 | 6, 0)[1]
    assert other not in {counter}
    for _ in range(3):
        machine.call(sbi.TIME, 0, 1)
    machine.call(sbi.TIME, 0, 1, hart=1)
    machine.call(sbi.IPI, 0, 1, 0)
    assert machine.call(sbi.PMU, 5, counter) == (SUCCESS, 3)
    assert machine.call(sbi.PMU, 6, counter) == (SUCCESS, 0)
    assert machine.call(sbi.PMU, 5, other) == (SUCCESS, 1)
    assert machine.call(sbi.PMU, 5, counter, hart=1)[0] == BAD, "each hart has its own"
    machine.call(sbi.PMU, 4, counter, 1, 0)
    machine.call(sbi.TIME, 0, 1)
    assert machine.call(sbi.PMU, 5, counter) == (SUCCESS, 3)
    assert machine.call(sbi.PMU, 7)[0] == NO


def test_any_call_with_any_arguments_is_answered() -> None:
    noise = random.Random(11)
    machine = Machine()
    interesting = [0, 1, 2, 3, 4, 63, MINUS_ONE, MINUS_ONE - 1, 1 << 63, 1 << 31, RAM_BASE,
                   RAM_BASE + SIZE - 1, 0x8000_0000, 15 << 16 | 5]  # fmt: skip
    extensions = [sbi.BASE, sbi.TIME, sbi.IPI, sbi.RFENCE, sbi.HSM, sbi.SRST, sbi.DBCN, sbi.PMU]
    for _ in range(10_000):
        arguments = [
            noise.choice(interesting) if noise.random() < 0.8 else noise.getrandbits(64)
            for _ in range(6)
        ]
        machine.typed += b"x" * noise.randrange(3)
        extension = noise.choice([*extensions, noise.getrandbits(32)])
        function = noise.randrange(9) if noise.random() < 0.95 else noise.getrandbits(64)
        # All but stop, which would end the only hart that calls here.
        if (extension, function) != (sbi.HSM, 1):
            machine.call(extension, function, *arguments)
    assert machine.call(sbi.BASE, 0) == (SUCCESS, 0x0200_0000)
