"""A thread that does not compute as IEEE 754 has it by default executes no guest."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import threading
from collections.abc import Callable

import pytest

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.code.environment import check_floating_environment
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.ram import Ram
from vmlab.machine.errors import VmlabError

# FE_DOWNWARD, FE_UPWARD and FE_TOWARDZERO of <fenv.h>.
ROUNDING = {
    "x86_64": (0x400, 0x800, 0xC00),
    "aarch64": (0x80_0000, 0x40_0000, 0xC0_0000),
}[platform.machine()]


def raised(body: Callable[[], object]) -> str:
    """What a function says that cannot be done, on a thread of its own."""
    said: list[str] = []

    def run() -> None:
        try:
            body()
        except VmlabError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return "".join(said)


@pytest.mark.parametrize("rounding", ROUNDING)
def test_another_rounding_is_refused(rounding: int) -> None:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))

    def body() -> None:
        assert libm.fesetround(rounding) == 0
        check_floating_environment()

    assert "does not round to nearest in this thread" in raised(body)
    check_floating_environment()  # other threads are as they were


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs MXCSR, in x86's fenv_t")
@pytest.mark.parametrize("bit", [1 << 15, 1 << 6], ids=["flush to zero", "denormals are zeros"])
def test_flushing_is_refused(bit: int) -> None:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))

    def body() -> None:
        environment = (ctypes.c_uint32 * 8)()
        assert libm.fegetenv(environment) == 0
        environment[7] |= bit  # MXCSR is the last word of it
        assert libm.fesetenv(environment) == 0
        check_floating_environment()

    assert "flushes small numbers to zero" in raised(body)


def test_no_guest_runs_on_such_a_thread() -> None:
    ram = Ram(1 << 20)
    executor = InterpreterExecutor(Hart(ram))
    libm = ctypes.CDLL(ctypes.util.find_library("m"))

    def body() -> None:
        assert libm.fesetround(ROUNDING[0]) == 0
        executor.run(1)

    assert "does not round to nearest" in raised(body)
    executor.run(1)
    ram.close()
