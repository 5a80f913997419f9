"""The same machine file and seed give the same run, whoever executes it and however it is paused.

Time is a count of instructions; harts take turns; idle time is skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import time
from pathlib import Path

import pytest
from tests.unit.engine.process import programs
from tests.unit.engine.process.conftest import Build, Built

from vmlab.engine import sequential_harts
from vmlab.engine.configuration import Execution, Idle, Time, TimeMode, load
from vmlab.engine.machine import Happening
from vmlab.engine.sequential_harts import SequentialHarts
from vmlab.machine.errors import InvalidSpec

DETERMINISTIC = Time(TimeMode.DETERMINISTIC)
EPOCH = DETERMINISTIC.epoch
HOUR = 1 << 35  # in ticks, as nearly as a power of two can be
SEIP = 9


def state(built: Built) -> tuple[list[dict[str, int]], str, int]:
    """All that a guest can see of its machine, but for devices."""
    machine = built.machine
    memory = hashlib.sha256(machine.ram.read(machine.ram.base, machine.ram.size)).hexdigest()
    harts = [hart.architectural() for hart in machine.harts]
    return harts, memory, machine.clock.ticks()


def finish(built: Built) -> tuple[list[dict[str, int]], str, int]:
    """Let a machine run until its guest powers off."""
    built.machine.resume()
    assert built.outcome()[0] is Happening.POWEROFF
    built.machine.pause()
    return state(built)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (programs.end(programs.POWEROFF), (Happening.POWEROFF, "system controller")),
        (programs.end(programs.FAIL | 9 << 16), (Happening.FAILED, "failure, code 9")),
        (programs.call(0x5352_5354, 0, 1, 1), (Happening.REBOOT, "asked firmware, for a failure")),
        (programs.TRAPS, (Happening.FAILED, "hart 0 traps without end at 0x0, cause 0x1")),
        (programs.LOADS_FROM_NOWHERE, (Happening.FAILED, "code 5")),
        (programs.WAKES_BY_TIMER, (Happening.POWEROFF, "system controller")),
        (programs.STARTS_ANOTHER, (Happening.POWEROFF, "system controller")),
    ],
)
def test_a_guest_s_end_is_told(
    build: Build, execution: Execution, code: bytes, outcome: tuple[Happening, str]
) -> None:
    built = build(code, execution=execution, harts=2, time=DETERMINISTIC)
    built.machine.resume()
    what, reason = built.outcome()
    assert what is outcome[0]
    assert outcome[1] in reason
    built.machine.pause()


# ----------------------------------------------------------------------------------- the same run


def test_two_harts_interleave_alike_whoever_executes_them_and_however_often_they_are_paused(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential_harts, "TURN", 700)  # so that a slow executor has many
    two = {"harts": 2, "time": DETERMINISTIC}
    native, again, paused = (build(programs.RACE, **two) for _ in range(3))
    reference = build(programs.RACE, execution=Execution.REFERENCE, **two)
    expected = finish(native)
    log = native.machine.ram.read(programs.RACE_LOG, programs.RACE_ENTRIES)
    assert log.count(1) and log.count(2) and not log.count(0), "both harts were at it"
    changes = sum(one != other for one, other in itertools.pairwise(log))
    assert changes > 10, "and took turns"
    assert finish(again) == expected
    assert finish(reference) == expected
    for _ in range(20):
        paused.machine.resume()
        paused.machine.pause()
    assert finish(paused) == expected


def test_a_pause_at_any_moment_changes_nothing(build: Build) -> None:
    """Also where harts sleep, and wake by timers and by one another."""
    expected = finish(build(programs.INTERRUPTS_ANOTHER, harts=2, time=DETERMINISTIC))
    built = build(programs.INTERRUPTS_ANOTHER, harts=2, time=DETERMINISTIC)
    machine = built.machine
    handle, pauses = machine.harts._handle, 0

    def pause_after(seat: object, left: object) -> None:
        nonlocal pauses
        handle(seat, left)
        pauses += 1
        machine.harts.ask_to_pause()

    machine.harts._handle = pause_after
    while built.told.empty():
        machine.resume()
        machine.pause()
    assert pauses > 3
    assert built.outcome()[0] is Happening.POWEROFF
    assert state(built) == expected


def test_the_seed_is_where_randomness_comes_from(build: Build) -> None:
    one, same, other = (
        state(build(programs.IDLE, time=DETERMINISTIC, seed=seed)) for seed in (7, 7, 8)
    )
    assert one == same
    assert one != other
    assert state(build(programs.IDLE, time=DETERMINISTIC)) == state(
        build(programs.IDLE, time=DETERMINISTIC, seed=0)
    )
    # A seed may be given where time is the host's, too; without one no two machines are alike.
    assert state(build(programs.IDLE, seed=7))[1] == one[1]
    assert state(build(programs.IDLE))[1] != state(build(programs.IDLE))[1]


def test_a_restart_is_part_of_the_run(build: Build) -> None:
    ends = []
    for _ in range(2):
        built = build(programs.end(programs.REBOOT), time=DETERMINISTIC, seed=1)
        for _ in range(3):
            built.machine.resume()
            assert built.outcome()[0] is Happening.REBOOT
            built.machine.reset()
        ends.append(state(built))
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("per_tick", [1, 10, 64])
def test_time_is_instructions(build: Build, execution: Execution, per_tick: int) -> None:
    setting = Time(TimeMode.DETERMINISTIC, instructions_per_tick=per_tick)
    built = build(programs.LOOKS_AT_CLOCKS, execution=execution, time=setting)
    finish(built)
    machine = built.machine
    (hart,) = machine.harts
    assert machine.clock.instructions == hart.retired
    assert machine.clock.ticks() == hart.retired // per_tick
    first, second, by_device = hart.x(programs.A0), hart.x(programs.A1), hart.x(programs.A2)
    passed = programs.INSTRUCTIONS_BETWEEN_LOOKS
    assert passed // per_tick <= second - first <= passed // per_tick + 1
    assert second <= by_device <= second + 1 + 10 // per_tick


def test_the_time_of_day_is_that_of_the_machine_file(build: Build) -> None:
    built = build(programs.IDLE, time=DETERMINISTIC)
    assert built.machine.board.rtc.now() == EPOCH * 10**9
    built = build(programs.IDLE, time=Time(TimeMode.DETERMINISTIC, epoch=86_400))
    assert built.machine.board.rtc.now() == 86_400 * 10**9


def test_idle_time_is_skipped(build: Build, execution: Execution) -> None:
    built = build(programs.sleeps(HOUR), execution=execution, time=DETERMINISTIC, harts=2)
    finish(built)
    assert HOUR <= built.machine.clock.ticks() < HOUR + 1000


def test_idle_time_may_take_as_long_as_it_says(build: Build) -> None:
    ticks = 1 << 19  # 52 ms
    setting = Time(TimeMode.DETERMINISTIC, idle=Idle.WAIT)
    built = build(programs.sleeps(ticks), time=setting)
    begun = time.monotonic()
    finish(built)
    assert time.monotonic() - begun >= ticks / 10_000_000
    assert built.machine.clock.ticks() >= ticks


@pytest.mark.parametrize("idle", list(Idle))
def test_a_guest_that_waits_for_nothing_in_particular_is_woken_from_outside(
    build: Build, idle: Idle
) -> None:
    built = build(programs.WAITS_FOR_A_DEVICE, time=Time(TimeMode.DETERMINISTIC, idle=idle))
    machine = built.machine
    machine.resume()
    while not machine.harts.exits(0)["wait"]:
        threading.Event().wait(0.001)
    machine.pause()
    stood = machine.clock.ticks()
    machine.resume()
    machine.harts.set_pending(0, SEIP, True)
    assert built.outcome()[0] is Happening.POWEROFF
    machine.pause()
    assert machine.clock.ticks() >= stood


def test_a_guest_that_is_waited_for_is_woken_from_outside(build: Build) -> None:
    """Half an hour of the host's time is not waited for; some of it has passed, though."""
    setting = Time(TimeMode.DETERMINISTIC, idle=Idle.WAIT)
    built = build(programs.sleeps(HOUR, or_device=True), time=setting)
    machine = built.machine
    machine.resume()
    while not machine.harts.exits(0)["wait"]:
        threading.Event().wait(0.001)
    machine.harts.set_pending(0, SEIP, True)
    assert built.outcome()[0] is Happening.POWEROFF
    machine.pause()
    assert machine.clock.ticks() < HOUR


def test_a_running_guest_is_paused_joined_and_goes_on(build: Build, execution: Execution) -> None:
    built = build(programs.SPIN, execution=execution, time=DETERMINISTIC, harts=2)
    machine = built.machine
    assert isinstance(machine.harts, SequentialHarts)
    first = next(iter(machine.harts))
    for _ in range(3):
        before = first.x(programs.T0)
        machine.resume()
        threads = machine.harts.thread_ids()
        assert len(set(threads)) == 1 and threads[0]
        while first.x(programs.T0) == before:
            threading.Event().wait(0.001)
        machine.pause()
        stood = first.x(programs.T0), machine.clock.ticks()
        machine.harts.join()
        assert machine.harts.thread_ids() == [0, 0]
        assert (first.x(programs.T0), machine.clock.ticks()) == stood


def test_an_access_that_nothing_answers_traps_alike(build: Build) -> None:
    ends = [
        finish(build(programs.LOADS_AND_GOES_ON, execution=each, time=DETERMINISTIC))
        for each in Execution
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("mode", list(TimeMode))
def test_a_mistake_of_a_device_is_told_and_the_machine_can_be_brought_to_stand(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: TimeMode,
) -> None:
    built = build(programs.LOOKS_AT_THE_DATE, time=Time(mode))
    machine = built.machine

    def broken(offset: int, size: int) -> int:
        raise RuntimeError("a device with a mistake")

    monkeypatch.setattr(machine.board.rtc, "read", broken)
    machine.resume()
    what, reason = built.outcome()
    assert what is Happening.FAILED
    assert "internal error: RuntimeError: a device with a mistake" in reason
    machine.pause()
    machine.harts.join()
    assert "in broken" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[time]\ninstructions-per-tick = 0", "time.instructions-per-tick"),
        ("[time]\nepoch = -1", "time.epoch"),
        ('[time]\nmode = "icount"', "time.mode = 'icount': one of host, deterministic"),
        ("[time]\nspeed = 1", "time.speed: none of that name; there are epoch, idle"),
        ("seed = -1", "seed"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(f'name = "a"\nqmp = "q"\nmemory = 1048576\n{line}\n')
    with pytest.raises(InvalidSpec, match=re.escape(told)):
        load(file)


def test_settings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    lines = ['name = "a"\nqmp = "q"\nmemory = 1048576\nseed = 18446744073709551615\n[time]']
    lines += ['mode = "deterministic"\ninstructions-per-tick = 3\nepoch = 5\nidle = "wait"']
    file.write_text("\n".join(lines))
    made = load(file)
    assert made.seed == (1 << 64) - 1
    assert made.time == Time(TimeMode.DETERMINISTIC, 3, 5, Idle.WAIT)
