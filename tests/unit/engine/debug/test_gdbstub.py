"""The GDB stub, as a client of it sees a guest of a few instructions, under each executor."""

from __future__ import annotations

import re
import socket
import threading
import xml.etree.ElementTree as ET

import pytest
from tests.unit.engine.debug.conftest import PATIENCE, Debug
from tests.unit.engine.process import programs
from tests.unit.engine.process.programs import A0, START, T0, T1, number, word

from vmlab.engine.configuration import Time, TimeMode
from vmlab.engine.cpu import layout
from vmlab.engine.debug.packets import packet
from vmlab.machine.errors import VmlabError

PC = 32
DATA = START + 0x1000
COUNT = word("addi", rd=A0, rs1=A0, imm=1)
# Count in a0 for ever, and store it.
COUNTS = number(T0, DATA) + COUNT + word("sd", rs2=A0, rs1=T0) + programs.jump(-8)
LOOP = START + len(number(T0, DATA))


def stopped(text: str) -> tuple[int, dict[str, str]]:
    """The signal and the pairs of a stop."""
    assert text[0] == "T", text
    pairs = dict(pair.split(":", 1) for pair in text[3:].strip(";").split(";"))
    return int(text[1:3], 16), pairs


def pc_of(stop: str) -> int:
    return int.from_bytes(bytes.fromhex(stopped(stop)[1]["20"]), "little")


def test_a_client_finds_the_machine_standing_and_its_harts_as_threads(debug: Debug) -> None:
    machine = debug(COUNTS, harts=2)
    machine.do(machine.control.cont)
    client = machine.connect()
    assert "swbreak+" in client.ask("qSupported:swbreak+;hwbreak+")
    signal, pairs = stopped(client.ask("?"))
    assert (signal, pairs["thread"]) == (5, "1")
    assert machine.control.status.value == "paused"
    assert client.ask("qfThreadInfo") == "m1,2"
    assert client.ask("qsThreadInfo") == "l"
    first = bytes.fromhex(client.ask("qThreadExtraInfo,1")).decode()
    second = bytes.fromhex(client.ask("qThreadExtraInfo,2")).decode()
    assert (first, second) == ("hart 0, supervisor mode", "hart 1, machine mode, not started")
    assert client.ask("T3") == "E16"
    assert client.ask("vMustReplyEmpty") == ""


def test_the_description_names_every_register_once(debug: Debug) -> None:
    client = debug(COUNTS).connect()

    def read(name: str) -> str:
        text = ""
        while True:
            part = client.ask(f"qXfer:features:read:{name}:{len(text):x},400")
            text += part[1:]
            if part[0] == "l":
                return text

    included = re.findall(r'href="([^"]+)"', read("target.xml"))
    numbers: list[str] = []
    names: set[str] = set()
    for name in included:
        for register in ET.fromstring(read(name).split("\n", 2)[2]).iter("reg"):
            assert register.get("bitsize") == "64"
            numbers.append(register.get("regnum", ""))
            names.add(register.get("name", ""))
    assert len(set(numbers)) == len(numbers) == len(names)
    assert {"zero", "sp", "pc", "ft0", "fcsr", "satp", "mstatus", "priv"} <= names
    assert client.ask("qXfer:features:read:other.xml:0,400") == "E00"


def test_registers_are_read_and_written(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    hart = next(iter(machine.machine.harts))
    general = client.ask("g")
    assert len(general) == 33 * 16
    assert client.register(PC) == START == int.from_bytes(bytes.fromhex(general[-16:]), "little")
    client.ok(f"P{A0:x}=" + (7).to_bytes(8, "little").hex())
    assert (client.register(A0), hart.x(A0)) == (7, 7)
    client.ok("P21=" + (1 << 62).to_bytes(8, "little").hex())
    assert hart.f(0) == 1 << 62
    scratch = 65 + 0x140
    client.ok(f"P{scratch:x}=" + (9).to_bytes(8, "little").hex())
    assert hart[layout.SSCRATCH] == client.register(scratch) == 9
    hart[layout.FRM] = 3
    assert client.register(65 + 3) == 3 << 5
    assert client.register(65 + 4096) == 1
    assert client.ask("P1041=" + (2).to_bytes(8, "little").hex()) == "E16"
    assert client.ask("pffff") == "E16"
    client.ok("G" + general)
    assert hart.x(A0) == 0


def test_memory_is_read_and_written(debug: Debug) -> None:
    client = debug(COUNTS).connect()
    assert client.memory(START, 8) == COUNTS[:8]
    client.ok(f"M{DATA:x},2:abcd")
    client.ok(f"X{DATA + 2:x},2:}}\x03}}\x04")
    assert client.memory(DATA, 4) == b"\xab\xcd#$"
    assert client.ask("m10000000,1") == "E0e"
    assert client.ask("M10000000,1:00") == "E0e"
    assert client.ask("mx,1") == "E16"
    # What there is before the end of RAM.
    assert client.memory(0x8000_0000 + (8 << 20) - 2, 8) == bytes(2)


def test_a_breakpoint_is_told_and_stepped_over(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.ask("qSupported:swbreak+;hwbreak+")
    client.ok(f"Z0,{LOOP:x},4")
    client.send("vCont;c")
    stop = client.receive()
    assert stopped(stop)[0] == 5
    assert "swbreak" in stopped(stop)[1]
    assert pc_of(stop) == LOOP
    assert machine.control.status.value == "debug"
    assert pc_of(client.ask("vCont;s:1")) == LOOP + 4
    assert client.register(A0) == 1
    client.ok(f"z0,{LOOP:x},4")
    client.ok(f"Z1,{LOOP + 4:x},4")
    assert "hwbreak" in stopped(client.ask("c"))[1]
    assert client.register(A0) == 1
    # Whoever else lets the machine run does not stay where it is.
    machine.do(lambda: None)  # the stop has been told to everybody
    while not machine.events.empty():
        machine.events.get()
    machine.do(machine.control.cont)
    machine.event("STOP")
    assert client.register(A0) == 2


def test_single_steps_are_of_one_instruction(debug: Debug) -> None:
    client = debug(COUNTS).connect()
    seen = [pc_of(client.ask("s")) for _ in range(len(number(T0, DATA)) // 4 + 4)]
    assert seen[-4:] == [LOOP + 4, LOOP + 8, LOOP, LOOP + 4]
    assert pc_of(client.ask("S05")) == LOOP + 8
    # And from an address.
    assert pc_of(client.ask(f"s{LOOP:x}")) == LOOP + 4


def test_a_watchpoint_is_told_with_its_address(debug: Debug) -> None:
    client = debug(COUNTS).connect()
    client.ok(f"Z2,{DATA:x},8")
    for count in (1, 2):
        stop = client.ask("vCont;c")
        assert stopped(stop)[1]["watch"] == f"{DATA:x}"
        assert pc_of(stop) == LOOP + 8
        assert int.from_bytes(client.memory(DATA, 8), "little") == count
    # A step tells it, too.
    client.ask("vCont;s:1")
    client.ask("vCont;s:1")
    assert stopped(client.ask("vCont;s:1"))[1]["watch"] == f"{DATA:x}"
    client.ok(f"z2,{DATA:x},8")
    client.ok(f"Z3,{DATA:x},8")
    client.send("vCont;c")
    client.socket.sendall(b"\3")
    assert stopped(client.receive())[0] == 2


def test_there_are_so_many_watchpoints(debug: Debug) -> None:
    client = debug(COUNTS).connect()
    for place in range(layout.WATCHPOINTS):
        client.ok(f"Z4,{DATA + 8 * place:x},8")
    assert client.ask(f"Z4,{DATA + 800:x},8") == "E1c"
    client.ok(f"Z4,{DATA:x},8")
    client.ok(f"z4,{DATA:x},8")
    client.ok(f"Z4,{DATA + 800:x},8")
    assert client.ask("Z9,0,0") == ""


def test_a_guest_that_runs_is_interrupted(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.send("vCont;c")
    client.socket.sendall(b"\3")
    assert stopped(client.receive())[0] == 2
    assert machine.control.status.value == "paused"


def test_a_device_that_does_not_come_to_an_end_is_nothing_to_a_debugger(
    debug: Debug, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.send("vCont;c")
    pause = machine.machine.pause

    def stuck() -> None:
        pause()
        raise VmlabError("the device d is still at work")

    monkeypatch.setattr(machine.machine, "pause", stuck)
    client.socket.sendall(b"\3")
    assert stopped(client.receive())[0] == 2
    assert machine.control.status.value == "paused"
    assert not machine.machine.running


def test_others_hold_while_one_hart_steps(debug: Debug) -> None:
    machine = debug(programs.STARTS_ANOTHER, harts=2)
    client = machine.connect()
    # A hart that firmware has not started executes nothing.
    assert pc_of(client.ask("vCont;s:2")) == 0x8000_0000
    second = START + 4
    client.ok(f"Z0,{second:x},4")
    stop = client.ask("vCont;c")
    assert (stopped(stop)[1]["thread"], pc_of(stop)) == ("2", second)
    client.ok("Hg1")
    first = client.register(PC), next(iter(machine.machine.harts)).retired
    assert pc_of(client.ask("vCont;s:2")) == second + 4
    client.ok("Hg1")
    assert (client.register(PC), next(iter(machine.machine.harts)).retired) == first
    client.ok(f"z0,{second:x},4")
    client.send("vCont;c")
    assert machine.told.get(timeout=PATIENCE)[0] == "poweroff"


def test_it_works_where_harts_take_turns(debug: Debug) -> None:
    machine = debug(programs.STARTS_ANOTHER, harts=2, time=Time(TimeMode.DETERMINISTIC))
    client = machine.connect()
    second = START + 4
    client.ok(f"Z0,{second:x},4")
    assert stopped(client.ask("vCont;c"))[1]["thread"] == "2"
    assert pc_of(client.ask("vCont;s:2")) == second + 4
    assert pc_of(client.ask("vCont;s:2;c")) == second + 8
    client.ok(f"z0,{second:x},4")
    client.send("vCont;c")
    assert machine.told.get(timeout=PATIENCE)[0] == "poweroff"


def test_a_device_is_answered_in_a_step(debug: Debug) -> None:
    code = number(T0, 0x1000_0000) + word("lbu", rd=T1, rs1=T0, imm=2) + programs.SPIN
    client = debug(code).connect()
    for _ in range(len(code) // 4 - 2):
        client.ask("s")
    assert client.register(T1) == 1


def test_who_waits_for_an_interrupt_is_stepped_past_it(debug: Debug) -> None:
    client = debug(programs.IDLE).connect()
    assert pc_of(client.ask("s")) == START + 4
    assert pc_of(client.ask("s")) == START


def test_detaching_takes_the_points_out_and_lets_the_guest_run(debug: Debug) -> None:
    machine = debug(
        number(T1, 3)
        + COUNT
        + word("bne", rs1=A0, rs2=T1, imm=-4)
        + programs.end(programs.POWEROFF)
    )
    client = machine.connect()
    client.ok(f"Z0,{START + 8:x},4")
    client.ask("vCont;c")
    client.ok("D")
    assert machine.told.get(timeout=PATIENCE)[0] == "poweroff"


def test_hanging_up_leaves_the_guest_standing_without_points(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.ok(f"Z0,{LOOP:x},4")
    client.ask("vCont;c")
    client.close()
    again = machine.connect()
    assert machine.control.status.value == "debug"
    again.send("vCont;c")
    again.socket.sendall(b"\3")
    assert stopped(again.receive())[0] == 2


def test_what_a_client_says_is_not_taken_for_what_the_one_before_it_said(debug: Debug) -> None:
    """The owner's thread comes to the first one's packet when the second one is there."""
    machine = debug(COUNTS)
    client = machine.connect()
    channel = machine.server._channel
    busy, free = threading.Event(), threading.Event()

    def is_busy() -> None:
        busy.set()
        free.wait(PATIENCE)

    machine._work.put(is_busy)
    assert busy.wait(PATIENCE)
    client.send("qfThreadInfo")
    while not channel._incoming:
        threading.Event().wait(0.001)
    client.close()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE)
        raw.connect(str(machine.path))
        raw.sendall(packet(b"QStartNoAckMode"))
        while not (channel.number == 2 and channel._incoming):
            threading.Event().wait(0.001)
        free.set()
        answer = b""
        while len(answer) < len(b"+$OK#9a") and (piece := raw.recv(100)):
            answer += piece
        assert answer == b"+$OK#9a"


def test_killing_ends_the_machine(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.send("k")
    client.send("?")
    client.receive()
    assert [cause.value for cause in machine.quit] == ["host-qmp-quit"]


def test_a_guest_that_fails_is_told_as_aborted(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.send("vCont;c")

    def fail() -> None:
        machine.machine.pause()
        machine.control.status = type(machine.control.status).INTERNAL_ERROR

    machine.do(fail)
    assert stopped(client.receive())[0] == 6
    assert stopped(client.ask("vCont;c"))[0] == 6


def test_the_monitor_is_asked_by_name(debug: Debug) -> None:
    client = debug(COUNTS).connect()
    assert client.monitor("query-status") == {"running": False, "status": "prelaunch"}
    assert "x-query-mmu\n" in client.monitor("help")
    assert client.monitor("nothing") == "The command nothing has not been found\n"
    assert "is no address" in client.monitor('x-trace-start {"file": "t", "start": "nowhere"}')
    assert "arguments are a JSON object" in client.monitor("stop []")
    assert "Expecting" in client.monitor("stop {")


def test_a_broken_packet_is_asked_for_again(debug: Debug) -> None:
    machine = debug(COUNTS)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE)
        raw.connect(str(machine.path))
        raw.sendall(b"$qC#00")
        assert raw.recv(1) == b"-"
        raw.sendall(b"$qC#b4")
        answer = b""
        while len(answer) < len(b"+$QC1#c5"):
            answer += raw.recv(100)
        assert answer == b"+$QC1#c5"
        raw.sendall(b"-")
        answer = b""
        while len(answer) < len(b"$QC1#c5"):
            answer += raw.recv(100)
        assert answer == b"$QC1#c5"


def test_two_watched_stores_at_once_are_told_one_after_the_other(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.ok(f"Z2,{DATA:x},8")
    client.ask("vCont;c")
    assert machine.control.reason is not None
    # As if another hart had stored at the same moment.
    machine.do(lambda: machine.control.trapped(machine.control.reason))
    retired = next(iter(machine.machine.harts)).retired
    assert "watch" in stopped(client.ask("vCont;c"))[1]
    assert next(iter(machine.machine.harts)).retired == retired
    client.ask("vCont;c")
    assert next(iter(machine.machine.harts)).retired == retired + 3


def test_what_one_client_has_not_been_told_is_not_told_to_the_next(debug: Debug) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    client.ok(f"Z2,{DATA:x},8")
    client.ask("vCont;c")
    machine.do(lambda: machine.control.trapped(machine.control.reason))
    client.close()
    again = machine.connect()
    again.send("vCont;c")
    again.socket.sendall(b"\3")
    assert stopped(again.receive())[0] == 2
