"""Page tables, traps, interrupts and PMP: programs in assembly find the same on QEMU and on us."""

from __future__ import annotations

import queue
import shutil
from pathlib import Path

import pytest
from tests.unit.engine.oracles.assembly import (
    DIFFERENCES,
    PREFIX,
    PROGRAMS,
    QEMU,
    build,
    in_qemu,
    unexplained,
)

from vmlab.engine.configuration import Boot, Configuration, Execution, SocketPort
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.machine import Happening, Machine

pytestmark = pytest.mark.skipif(
    QEMU is None or shutil.which(PREFIX + "gcc") is None,
    reason="needs Debian's qemu-system-misc and gcc-riscv64-linux-gnu",
)
PATIENCE = 3600


def on_engine(made: Path, folder: Path, execution: Execution) -> list[str]:
    """What a program tells on a machine of ours."""
    log = folder / "log"
    told: queue.SimpleQueue[tuple[Happening, str]] = queue.SimpleQueue()
    mistakes: list[BaseException] = []
    reactor = Reactor(mistakes.append)
    machine = Machine(
        Configuration(
            name="vm",
            memory=64 << 20,
            qmp=str(folder / "q.sock"),
            execution=execution,
            boot=Boot(firmware=str(made)),
            serial=SocketPort(str(folder / "s.sock"), log=str(log)),
            scsi=False,
        ),
        reactor,
        lambda *what: told.put(what),
    )
    reactor.start()
    try:
        machine.resume()
        happened, reason = told.get(timeout=PATIENCE)
        assert happened is Happening.POWEROFF, reason
    finally:
        machine.close()
        reactor.close()
    assert mistakes == []
    return log.read_text().splitlines()


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_finds_what_it_finds_on_qemu(program: str, tmp_path: Path) -> None:
    made = build(program, tmp_path)
    ours = on_engine(made, tmp_path, Execution.INTERPRETER)
    found, seen = unexplained(program, ours, in_qemu(program, made))
    assert not found, "\n".join(found[:40])
    known = {index: each.lines for index, each in enumerate(DIFFERENCES) if each.program == program}
    assert seen == known, "a difference is listed that is none"


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("program", ["translation", "interrupts"])
def test_the_reference_finds_it_as_well(program: str, tmp_path: Path) -> None:
    made = build(program, tmp_path, quick=True)
    ours = on_engine(made, tmp_path, Execution.REFERENCE)
    found, _ = unexplained(program, ours, in_qemu(program, made))
    assert not found, "\n".join(found[:40])


@pytest.mark.soak
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_reference_finds_the_same_to_the_letter(program: str, tmp_path: Path) -> None:
    """The whole of it, as native code and QEMU run it."""
    made = build(program, tmp_path)
    first, second = tmp_path / "reference", tmp_path / "interpreter"
    first.mkdir()
    second.mkdir()
    ours = on_engine(made, first, Execution.REFERENCE)
    assert ours == on_engine(made, second, Execution.INTERPRETER)
    found, _ = unexplained(program, ours, in_qemu(program, made))
    assert not found, "\n".join(found[:40])
