"""A hart that assembly programs run on, under each executor."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.ram import Ram

PREFIX = "riscv64-linux-gnu-"
RAM_SIZE = 4 << 20
EXECUTORS: dict[str, Callable[[Hart], Executor]] = {
    "reference": ReferenceExecutor,
    "interpreter": InterpreterExecutor,
}


@pytest.fixture
def ram() -> Iterator[Ram]:
    memory = Ram(RAM_SIZE)
    yield memory
    memory.close()


@pytest.fixture(params=sorted(EXECUTORS))
def executor(request: pytest.FixtureRequest, ram: Ram) -> Executor:
    """An executor of a hart whose time is counted in instructions."""
    hart = Hart(ram)
    hart[layout.TIME_DIVISOR] = 10
    return EXECUTORS[request.param](hart)


@pytest.fixture
def assemble(tmp_path: Path) -> Callable[[str], bytes]:
    """Assembly to code that runs at the start of RAM."""
    if shutil.which(PREFIX + "gcc") is None:
        pytest.skip("needs Debian's gcc-riscv64-linux-gnu")

    def run(text: str) -> bytes:
        source, made, image = tmp_path / "a.S", tmp_path / "a.elf", tmp_path / "a.bin"
        source.write_text(".option nopic\n.globl _start\n_start:\n" + text + "\n")
        options = "-march=rv64gc_zicsr_zifencei -mabi=lp64d -nostdlib -static -Wl,--build-id=none"
        command = [PREFIX + "gcc", *options.split(), "-Wl,-Ttext=0x80000000", "-o", made, source]
        subprocess.run(command, check=True)
        copy = [PREFIX + "objcopy", "-O", "binary", "-j", ".text", made, image]
        subprocess.run(copy, check=True)
        return image.read_bytes()

    return run
