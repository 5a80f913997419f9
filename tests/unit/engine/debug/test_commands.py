"""Statistics and traces of a guest of a few instructions, over the monitor's commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.unit.engine.debug.conftest import PATIENCE, Debug, Debugged
from tests.unit.engine.process import programs
from tests.unit.engine.process.programs import A0, START, T0, T1, number, word

from vmlab.engine.configuration import Execution
from vmlab.engine.debug.commands import TraceInfo
from vmlab.engine.monitor.commands import CommandError

DATA = START + 0x1000
LOOPS = 50
# Count down, storing, and power off.
COUNTS = (
    number(T0, DATA)
    + number(A0, LOOPS)
    + word("sd", rs2=A0, rs1=T0)
    + word("ld", rd=T1, rs1=T0)
    + word("addi", rd=A0, rs1=A0, imm=-1)
    + word("bne", rs1=A0, rs2=0, imm=-12)
    + programs.end(programs.POWEROFF)
)
LOOP = START + len(number(T0, DATA) + number(A0, LOOPS))


def ask(machine: Debugged, name: str, **arguments: Any) -> Any:
    def work() -> Any:
        try:
            return machine.control.commands.find(name).call(arguments)
        except CommandError as error:
            return error

    answer = machine.do(work)
    if isinstance(answer, CommandError):
        raise answer
    return answer


def run(machine: Debugged) -> None:
    machine.do(machine.control.cont)
    assert machine.told.get(timeout=PATIENCE)[0] == "poweroff"
    machine.do(machine.machine.pause)


def test_the_mmu_is_told_per_set(debug: Debug, execution: Execution) -> None:
    machine = debug(COUNTS, harts=2)
    if execution is Execution.INTERPRETER:
        ask(machine, "x-count-tlb-hits", enable=True)
    run(machine)
    first, second = ask(machine, "x-query-mmu")
    assert (first["hart"], second["hart"]) == (0, 1)
    if execution is Execution.REFERENCE:
        assert first["sets"] == []
        return
    assert first["counting"]
    (used,) = [each for each in first["sets"] if each["current"]]
    assert (used["privilege"], used["satp"], used["asid"]) == (1, 0, 0)
    assert used["read-hits"] == LOOPS - 1
    assert used["write-hits"] == LOOPS - 1
    # And the store that ends it all.
    assert (used["read-misses"], used["write-misses"], used["fills"]) == (1, 2, 2)
    ask(machine, "x-count-tlb-hits", enable=False)
    assert "read-hits" not in ask(machine, "x-query-mmu")[0]["sets"][0]


def test_the_reference_executor_counts_no_hits(debug: Debug, execution: Execution) -> None:
    machine = debug(COUNTS)
    if execution is Execution.REFERENCE:
        with pytest.raises(CommandError, match="has no TLB"):
            ask(machine, "x-count-tlb-hits", enable=True)
    else:
        ask(machine, "x-count-tlb-hits", enable=True)


def test_exits_are_told_by_reason_and_by_device(debug: Debug, execution: Execution) -> None:
    code = number(T0, 0x1000_0000) + word("lbu", rd=T1, rs1=T0, imm=2)
    code += programs.call(0x10, 3, 0x10) + programs.call(0x999, 7)
    machine = debug(code + programs.end(programs.POWEROFF))
    run(machine)
    (told,) = ask(machine, "x-query-exits")
    assert told["retired"] >= len(code) // 4

    def counts(name: str) -> dict[str, int]:
        return {each["reason"]: each["count"] for each in told[name]}

    assert counts("reasons")["read"] == counts("reasons")["write"] == 1
    assert counts("devices") == {"uart": 1, "syscon": 1}
    assert counts("calls") == {"base.3": 1, "0x999.7": 1}
    assert counts("served") == ({} if execution is Execution.REFERENCE else {"code": 1})


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def test_a_trace_has_each_instruction_and_what_it_changes(debug: Debug, tmp_path: Path) -> None:
    machine = debug(COUNTS)
    ask(machine, "x-trace-start", file=str(tmp_path / "t"), count=12, start=hex(LOOP))
    assert ask(machine, "x-query-trace")[0]["tracing"] is False
    run(machine)
    ended = machine.event("X_TRACE_ENDED")
    assert ended == TraceInfo(0, str(tmp_path / "t"), False, 12)
    assert ask(machine, "x-query-trace") == []
    lines = lines_of(tmp_path / "t")
    assert len(lines) == 12
    parts = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert [part[1].split(" ;")[0] for part in parts[:4]] == [
        "sd a0,0(t0)",
        "ld t1,0(t0)",
        "addi a0,a0,-1",
        f"bnez a0,{LOOP:x}" if "0x" not in parts[3][1] else f"bnez a0,{LOOP:#x}",
    ]
    assert f"S {LOOP:016x}" in lines[0]
    assert lines[1].endswith(f"; t1={LOOPS:#x}")
    assert lines[2].endswith(f"; a0={LOOPS - 1:#x}")
    assert ";" not in lines[3]


def test_a_trace_ends_at_an_address(debug: Debug, tmp_path: Path) -> None:
    machine = debug(COUNTS)
    file = tmp_path / "t"
    ask(machine, "x-trace-start", file=str(file), stop=f"{LOOP:#x}+8", symbols=False)
    run(machine)
    machine.event("X_TRACE_ENDED")
    assert len(lines_of(file)) == (LOOP + 8 - START) // 4


def test_a_trace_has_what_devices_answer_and_traps(debug: Debug, tmp_path: Path) -> None:
    code = number(T0, 0x1000_0000) + word("lbu", rd=T1, rs1=T0, imm=2) + bytes(4)
    machine = debug(programs.handled(code, programs.end(programs.POWEROFF)))
    file = tmp_path / "t"
    ask(machine, "x-trace-start", file=str(file), symbols=False)
    run(machine)
    ask(machine, "x-trace-stop")
    lines = lines_of(file)
    (load,) = [line for line in lines if "lbu" in line]
    assert load.endswith("; t1=0x1")
    (trap,) = [line for line in lines if "scause=" in line]
    assert "scause=0x2" in trap
    assert ".2byte" in trap
    with pytest.raises(CommandError, match="is not traced"):
        ask(machine, "x-trace-stop")


def test_a_trace_has_interrupts(debug: Debug, tmp_path: Path) -> None:
    machine = debug(programs.WAKES_BY_TIMER)
    file = tmp_path / "t"
    ask(machine, "x-trace-start", file=str(file), symbols=False)
    run(machine)
    ask(machine, "x-trace-stop")
    assert any(line.startswith("# interrupt 5 at 0x") for line in file.read_text().splitlines())


def test_breakpoints_stop_a_hart_that_is_traced(debug: Debug, tmp_path: Path) -> None:
    machine = debug(COUNTS)
    client = machine.connect()
    ask(machine, "x-trace-start", file=str(tmp_path / "t"), symbols=False)
    client.ok(f"Z0,{LOOP:x},4")
    for left in (LOOPS, LOOPS - 1):
        client.ask("vCont;c")
        assert client.register(32) == LOOP
        assert client.register(A0) == left
        client.ask("vCont;s:1")
    ask(machine, "x-trace-stop")
    assert len(lines_of(tmp_path / "t")) == (LOOP - START) // 4 + 5


def test_what_cannot_be_traced_is_said(debug: Debug, tmp_path: Path) -> None:
    machine = debug(COUNTS)
    with pytest.raises(CommandError, match="there is no 4"):
        ask(machine, "x-trace-start", file=str(tmp_path / "t"), hart=4)
    with pytest.raises(CommandError, match="cannot be written"):
        ask(machine, "x-trace-start", file=str(tmp_path / "no" / "t"))
    with pytest.raises(CommandError, match="is no address"):
        ask(machine, "x-trace-start", file=str(tmp_path / "t"), start="nowhere+1")
    ask(machine, "x-trace-start", file=str(tmp_path / "t"))
    with pytest.raises(CommandError, match="traced already"):
        ask(machine, "x-trace-start", file=str(tmp_path / "t"))
    ask(machine, "x-trace-stop")
