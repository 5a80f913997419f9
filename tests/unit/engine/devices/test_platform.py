"""UART, PLIC, ACLINT, clock chip and finisher: one script of accesses, here and on QEMU."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.aclint import Aclint
from vmlab.engine.devices.clock import ManualClock

UART, RTC, CLINT, PLIC, TEST = 0x1000_0000, 0x10_1000, 0x200_0000, 0xC00_0000, 0x10_0000
RBR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
SECOND = 1_000_000_000


@pytest.fixture(params=["engine", "qemu"])
def machine(request: pytest.FixtureRequest) -> Engine | Qemu:
    if request.param == "engine":
        return request.getfixturevalue("engine")
    start: Callable[..., Qemu] = request.getfixturevalue("qemu")
    return start("-serial", "null")


def test_the_uart_has_the_registers_of_a_16550a(machine: Engine | Qemu) -> None:
    def uart(register: int, value: int | None = None) -> int:
        if value is None:
            return machine.read(UART + register, 1)
        machine.write(UART + register, 1, value)
        return value

    assert uart(IIR) == 0x01, "nothing to tell"
    assert uart(LSR) == 0x60, "the transmitter is empty"
    assert uart(MSR) == 0xB0
    uart(SCR, 0x5A)
    assert uart(SCR) == 0x5A
    uart(LCR, 0x83)
    uart(0, 0x34)
    uart(1, 0x12)
    assert (uart(0), uart(1)) == (0x34, 0x12), "the divisor"
    uart(LCR, 0x03)
    assert uart(LCR) == 0x03
    uart(FCR, 0x01)
    assert uart(IIR) == 0xC1, "FIFOs are on"
    uart(FCR, 0x00)
    assert uart(IIR) == 0x01
    uart(IER, 0x02)
    assert uart(IIR) == 0x02, "enabling the interrupt of an empty transmitter raises it"
    assert uart(IIR) == 0x01, "and reading the cause clears it"
    uart(0, ord("x"))
    assert uart(IIR) == 0x02
    uart(IER, 0x00)
    assert uart(IIR) == 0x01
    uart(IER, 0xFF)
    assert uart(IER) == 0x0F
    uart(IER, 0)


def test_the_uart_loops_back(machine: Engine | Qemu) -> None:
    machine.write(UART + MCR, 1, 0x1F)
    assert machine.read(UART + MSR, 1) & 0xF0 == 0xF0
    machine.write(UART + MCR, 1, 0x11)
    assert machine.read(UART + MSR, 1) & 0xF0 == 0x20
    machine.write(UART + MCR, 1, 0x12)
    assert machine.read(UART + MSR, 1) & 0xF0 == 0x10
    machine.write(UART + FCR, 1, 0x07)
    for byte in b"abc":
        machine.write(UART, 1, byte)
    assert machine.read(UART + LSR, 1) & 1
    assert bytes(machine.read(UART, 1) for _ in range(3)) == b"abc"
    assert not machine.read(UART + LSR, 1) & 1


def test_the_plic_keeps_of_a_write_what_its_registers_hold(machine: Engine | Qemu) -> None:
    noise = random.Random(5)
    registers = [PLIC + 4 * n for n in range(97)]
    registers += [PLIC + 0x2000 + 4 * n for n in range(3)]
    registers += [PLIC + 0x2080 + 4 * n for n in range(3)]
    registers += [PLIC + 0x20_0000, PLIC + 0x20_1000]
    seen = []
    for register in registers:
        value = noise.getrandbits(32) & ~1
        if register < PLIC + 0x1000 or register >= PLIC + 0x20_0000:
            value &= 7
        machine.write(register, 4, value)
        seen.append((register, machine.read(register, 4) == value))
    assert [register for register, kept in seen if not kept] == [PLIC]
    assert machine.read(PLIC + 0x1000, 4) == 0


def test_the_plic_hands_out_an_interrupt_once(machine: Engine | Qemu) -> None:
    """The UART's transmitter is the source, which both machines let us raise."""
    source = 10
    machine.write(PLIC + 4 * source, 4, 3)
    machine.write(PLIC + 0x2080, 4, 1 << source)  # S mode of hart 0
    machine.write(UART + IER, 1, 0x02)
    assert machine.read(PLIC + 0x1000, 4) == 1 << source
    assert machine.read(PLIC + 0x20_0004, 4) == 0, "M mode has not enabled it"
    if isinstance(machine, Engine):  # chapter 9: the threshold holds back interrupts, not claims
        machine.write(PLIC + 0x20_1000, 4, 3)
        assert machine.pending.get((0, 9), False) is False
    assert machine.read(PLIC + 0x20_1004, 4) == source
    assert machine.read(PLIC + 0x1000, 4) == 0
    assert machine.read(PLIC + 0x20_1004, 4) == 0
    assert machine.read(UART + IIR, 1) == 0x02, "the handler has dealt with the cause"
    machine.write(PLIC + 0x20_1004, 4, source)
    assert machine.read(PLIC + 0x1000, 4) == 0


def test_a_level_that_stays_high_comes_again_after_completion(engine: Engine) -> None:
    """PLIC 1.0.0, chapter 5, the gateway of a level-triggered source. QEMU 7.2 loses it."""
    plic = engine.board.plic
    engine.write(PLIC + 4 * 5, 4, 1)
    engine.write(PLIC + 0x2080, 4, 1 << 5)
    plic.set_level(5, True)
    assert engine.pending[0, 9] is True
    assert engine.read(PLIC + 0x20_1004, 4) == 5
    assert engine.pending[0, 9] is False
    plic.set_level(5, False)
    plic.set_level(5, True)
    assert engine.read(PLIC + 0x1000, 4) == 0, "the gateway is shut until completion"
    engine.write(PLIC + 0x20_1004, 4, 5)
    assert engine.pending[0, 9] is True
    assert engine.read(PLIC + 0x20_1004, 4) == 5
    plic.set_level(5, False)
    engine.write(PLIC + 0x20_1004, 4, 5)
    assert engine.pending[0, 9] is False


def test_the_plic_prefers_priority_and_then_the_lower_source() -> None:
    engine = Engine(harts=2)
    plic = engine.board.plic
    for source, priority in ((3, 2), (40, 5), (60, 5), (61, 0), (96, 1)):
        engine.write(PLIC + 4 * source, 4, priority)
        plic.set_level(source, True)
    context = 3  # S mode of hart 1
    for word in range(4):
        engine.write(PLIC + 0x2000 + 0x80 * context + 4 * word, 4, 0xFFFF_FFFF)
    engine.write(PLIC + 0x20_0000 + 0x1000 * context, 4, 4)
    assert engine.pending.get((1, 9)) is True
    assert (1, 11) not in engine.pending and (0, 9) not in engine.pending
    claims = [engine.read(PLIC + 0x20_0004 + 0x1000 * context, 4) for _ in range(5)]
    assert claims == [40, 60, 3, 96, 0]
    engine.write(PLIC + 0x20_0004 + 0x1000 * context, 4, 40)
    assert engine.pending[1, 9] is True
    plic.set_level(40, False)
    assert engine.pending[1, 9] is True, "a request that was sent is not recalled"
    engine.write(PLIC + 0x2000 + 0x80 * context + 4, 4, 0)
    assert engine.pending[1, 9] is False
    engine.close()


def test_completion_of_what_is_not_enabled_is_ignored(engine: Engine) -> None:
    engine.write(PLIC + 4 * 7, 4, 1)
    engine.write(PLIC + 0x2080, 4, 1 << 7)
    engine.board.plic.set_level(7, True)
    assert engine.read(PLIC + 0x20_1004, 4) == 7
    engine.write(PLIC + 0x20_0004, 4, 7)  # M mode, where 7 is not enabled
    engine.write(PLIC + 0x20_1004, 4, 1000)
    assert engine.read(PLIC + 0x1000, 4) == 0
    engine.write(PLIC + 0x20_1004, 4, 7)
    assert engine.read(PLIC + 0x1000, 4) == 1 << 7


def test_the_clint_has_software_interrupts_and_comparators(machine: Engine | Qemu) -> None:
    assert machine.read(CLINT, 4) == 0
    machine.write(CLINT, 4, 0xFFFF_FFFF)
    assert machine.read(CLINT, 4) == 1
    machine.write(CLINT, 4, 0xFFFF_FFFE)
    assert machine.read(CLINT, 4) == 0
    machine.write(CLINT + 0x4000, 8, 0x0123_4567_89AB_CDEF)
    assert machine.read(CLINT + 0x4000, 8) == 0x0123_4567_89AB_CDEF
    assert machine.read(CLINT + 0x4000, 4) == 0x89AB_CDEF
    assert machine.read(CLINT + 0x4004, 4) == 0x0123_4567
    machine.write(CLINT + 0x4000, 4, 0x1111_1111)
    machine.write(CLINT + 0x4004, 4, 0x2222_2222)
    assert machine.read(CLINT + 0x4000, 8) == 0x2222_2222_1111_1111
    low, high = machine.read(CLINT + 0xBFF8, 4), machine.read(CLINT + 0xBFFC, 4)
    assert machine.read(CLINT + 0xBFF8, 8) >= high << 32 | low


def test_a_comparator_is_pending_from_its_moment_on() -> None:
    clock = ManualClock()
    pending: dict[tuple[int, int], bool] = {}
    aclint = Aclint(2, clock, lambda hart, bit, level: pending.__setitem__((hart, bit), level))
    aclint.write(0x4008, 8, 1000)
    assert pending == {(1, 7): False}
    clock.advance(99_900)
    assert aclint.read(0xBFF8, 8) == 999
    assert pending[1, 7] is False
    clock.advance(100)
    assert pending[1, 7] is True
    aclint.write(0x4008, 8, 2000)
    assert pending[1, 7] is False
    aclint.write(0x400C, 4, 1)  # the upper half: far away now
    clock.advance(SECOND)
    assert pending[1, 7] is False
    aclint.write(0x4008, 8, clock.ticks() + 1)
    assert pending[1, 7] is False
    aclint.write(0x4008, 8, clock.ticks())
    assert pending[1, 7] is True, "from this moment on, not from the next"
    assert (0, 7) not in pending
    aclint.reset()
    assert pending[1, 7] is False


def test_harts_that_compare_the_time_themselves_are_told_what_with() -> None:
    told: list[tuple[int, int]] = []
    aclint = Aclint(2, ManualClock(), lambda *args: None, lambda *args: told.append(args))
    aclint.write(0x4008, 8, 77)
    assert told == [(1, 77)]


def test_sswi_makes_a_supervisor_interrupt_pending() -> None:
    engine = Engine(harts=2, separate_aclint=True)
    engine.write(0x2F0_0004, 4, 1)
    assert engine.pending == {(1, 1): True}
    assert engine.read(0x2F0_0004, 4) == 0
    engine.write(0x2F0_0004, 4, 0)
    engine.write(0x2F0_0008, 4, 1)
    assert engine.pending == {(1, 1): True}
    engine.close()


def test_the_clock_chip_tells_and_keeps_the_time(machine: Engine | Qemu) -> None:
    moment = 1_800_000_000 * SECOND + 12345
    machine.write(RTC + 4, 4, moment >> 32)
    machine.write(RTC, 4, moment & 0xFFFF_FFFF)
    low = machine.read(RTC, 4)
    now = machine.read(RTC + 4, 4) << 32 | low
    assert 0 <= now - moment < 3600 * SECOND
    machine.write(RTC + 0x10, 4, 1)
    assert machine.read(RTC + 0x10, 4) == 1
    machine.write(RTC + 0xC, 4, (now + 3600 * SECOND) >> 32)
    machine.write(RTC + 0x8, 4, (now + 3600 * SECOND) & 0xFFFF_FFFF)
    assert machine.read(RTC + 0x18, 4) == 1, "the alarm is set"
    assert machine.read(RTC + 0xC, 4) << 32 | machine.read(RTC + 8, 4) == now + 3600 * SECOND
    machine.write(RTC + 0x14, 4, 1)
    assert machine.read(RTC + 0x18, 4) == 0


def test_the_clock_chips_alarm_rings(engine: Engine) -> None:
    now = engine.read(RTC, 4) | engine.read(RTC + 4, 4) << 32
    assert now == engine.clock.wall_nanoseconds()
    alarm = now + SECOND
    engine.write(RTC + 0x10, 4, 1)
    engine.write(RTC + 0xC, 4, alarm >> 32)
    engine.write(RTC + 0x8, 4, alarm & 0xFFFF_FFFF)
    engine.clock.advance(SECOND - 1)
    assert not engine.level(11)
    engine.clock.advance(1)
    assert engine.level(11)
    assert engine.read(RTC + 0x18, 4) == 0
    engine.write(RTC + 0x1C, 4, 1)
    assert not engine.level(11)
    # An alarm in the past rings at once; one that is cancelled does not.
    engine.write(RTC + 0x8, 4, 0)
    assert engine.level(11)
    engine.write(RTC + 0x10, 4, 0)
    assert not engine.level(11)


def test_the_clock_chips_time_survives_a_reset(engine: Engine) -> None:
    engine.write(RTC + 4, 4, 0x1234_5678)
    engine.board.reset()
    engine.read(RTC, 4)
    assert engine.read(RTC + 4, 4) == 0x1234_5678


@pytest.mark.parametrize(
    ("value", "end"),
    [(0x5555, ("poweroff", 0)), (0x7777, ("reboot", 0)), (0x0007_3333, ("fail", 7))],
)
def test_the_finisher_ends_the_machine(engine: Engine, value: int, end: tuple[str, int]) -> None:
    engine.write(TEST + 4, 4, value)
    engine.write(TEST, 4, 0x1234)
    assert engine.ends == []
    engine.write(TEST, 4, value)
    assert engine.ends == [end]


def test_bytes_for_the_uart_wait_until_there_is_room(engine: Engine) -> None:
    uart = engine.board.uart
    engine.write(UART + FCR, 1, 0x81)  # trigger at 8 bytes
    engine.write(UART + IER, 1, 1)
    assert not engine.level(10)
    assert uart.receive(b"hello") == 5
    assert engine.level(10)
    assert engine.read(UART + IIR, 1) == 0xCC, "below the trigger: a character timeout"
    assert uart.receive(b", world and more") == 16
    assert engine.read(UART + IIR, 1) == 0xC4
    got = bytearray()
    while engine.read(UART + LSR, 1) & 1:
        got.append(engine.read(UART, 1))
    assert got == b"hello, world and more"
    assert not engine.level(10)
    assert engine.read(UART, 1) == 0


def test_a_sender_waits_for_the_uart_and_loses_nothing(engine: Engine) -> None:
    uart = engine.board.uart
    data = bytes(n % 251 for n in range(20000))
    sent = 0

    def more() -> None:
        nonlocal sent
        sent += uart.receive(data[sent : sent + uart.room])

    uart.wanted = more
    more()
    assert sent < len(data)
    got = bytearray()
    while engine.read(UART + LSR, 1) & 1:
        got.append(engine.read(UART, 1))
    assert bytes(got) == data


def test_the_uart_sends_and_tells_of_a_break(engine: Engine) -> None:
    sent: list[bytes] = []
    engine.board.uart.send = sent.append
    for byte in b"ok\n":
        engine.write(UART, 1, byte)
    assert b"".join(sent) == b"ok\n"
    engine.write(UART + IER, 1, 4)
    engine.board.uart.break_()
    assert engine.level(10)
    assert engine.read(UART + IIR, 1) == 0x06
    assert engine.read(UART + LSR, 1) & 0x11 == 0x11
    assert not engine.level(10)
    assert engine.read(UART, 1) == 0


def test_a_loop_that_overflows_says_so(engine: Engine) -> None:
    engine.write(UART + MCR, 1, 0x10)
    engine.write(UART + FCR, 1, 1)
    for _ in range(17):
        engine.write(UART, 1, 7)
    assert engine.read(UART + LSR, 1) & 0x02
    assert not engine.read(UART + LSR, 1) & 0x02
