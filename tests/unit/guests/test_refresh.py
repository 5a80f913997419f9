"""What a restored guest is told: the program that seeds its kernel, and what callers ask for."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from elftools.elf.elffile import ELFFile

from vmlab.guests.command import Command, CommandChannel
from vmlab.guests.guest import Guest
from vmlab.guests.refresh import SEED_BYTES, reseed_program
from vmlab.hypervisors.base import Machine
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import OperationFailed

MACHINES = {
    Architecture.X86_64: "EM_X86_64",
    Architecture.RISCV64: "EM_RISCV",
    Architecture.AARCH64: "EM_AARCH64",
    Architecture.PPC64LE: "EM_PPC64",
}


class Recorder(CommandChannel):
    """A channel that notes what would be run."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    async def connect(self, *, timeout: float) -> None:
        """Always there."""

    async def run(self, command: Command, **more: Any) -> int:
        self.commands.append(command)
        return 0

    async def signal(self, process: int, number: int) -> None:
        raise AssertionError

    async def close(self) -> None:
        """Nothing to close."""


def refreshed(**asked: Any) -> list[Command]:
    channel = Recorder()
    machine = SimpleNamespace(name="vm", spec=SimpleNamespace(architecture=Architecture.X86_64))
    asyncio.run(Guest(cast("Machine", machine), channel).refresh(**asked))
    return channel.commands


@pytest.mark.parametrize("architecture", MACHINES)
def test_the_program_is_an_elf_file_of_its_architecture_with_the_seed_in_it(
    architecture: Architecture,
) -> None:
    seed = bytes(range(SEED_BYTES))
    program = reseed_program(architecture, seed)
    elf = ELFFile(io.BytesIO(program))  # it has no types
    assert elf["e_machine"] == MACHINES[architecture]
    (segment,) = elf.iter_segments()
    assert segment["p_filesz"] == len(program) < 512
    assert segment["p_vaddr"] < elf["e_entry"] < segment["p_vaddr"] + len(program) - len(seed)
    # struct rand_pool_info: entropy in bits, size in bytes, the bytes.
    assert program.endswith(
        (8 * SEED_BYTES).to_bytes(4, "little") + SEED_BYTES.to_bytes(4, "little") + seed
    )


def test_every_refresh_brings_another_seed_before_anything_else() -> None:
    first, second = refreshed(), refreshed()
    assert first[0].takes and first[0].input != second[0].input
    assert [len(commands) for commands in (first, second)] == [2, 2]
    assert "date -u -s" in first[1].text and "hostname" not in first[1].text


def test_name_id_and_addresses_are_set_where_they_are_asked_for() -> None:
    _, command = refreshed(
        hostname="clone-1", machine_id="0" * 32, macs={"52:54:00:00:00:01": "52:54:00:00:00:02"}
    )
    for part in ("'clone-1'", f"'{'0' * 32}'", "52:54:00:00:00:02"):
        assert part in command.text


@pytest.mark.parametrize(
    "asked",
    [
        {"hostname": "two words"},
        {"machine_id": "short"},
        {"macs": {"52:54:00:00:00:01": "no"}},
        {"macs": {"'; reboot; '": "52:54:00:00:00:02"}},
    ],
)
def test_what_is_none_is_refused_before_the_guest_is_touched(asked: dict[str, Any]) -> None:
    (field,) = asked
    with pytest.raises(OperationFailed, match=f"refresh: {field} has") as error:
        refreshed(**asked)
    assert error.value.hint
