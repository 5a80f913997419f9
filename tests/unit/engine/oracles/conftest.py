"""Executors for programs that an outside oracle runs as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.engine.oracles.code import RAM_SIZE

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.ram import Ram


@pytest.fixture
def hart() -> Iterator[Hart]:
    ram = Ram(RAM_SIZE)
    yield Hart(ram)
    ram.close()


@pytest.fixture
def interpreter(hart: Hart) -> InterpreterExecutor:
    return InterpreterExecutor(hart)


@pytest.fixture
def reference(hart: Hart) -> ReferenceExecutor:
    return ReferenceExecutor(hart)
