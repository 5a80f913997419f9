"""What a process wrote over a template, and the beginning of a stream that its copies share."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.hypervisors.qemu import private_memory as private
from vmlab.machine.architecture import Architecture

PAGE = 4096


def go_on() -> None:
    """A check that never ends the work."""


# ------------------------------------------------------------------- memory


def mapped(name: str, pages: int) -> tuple[int, mmap.mmap]:
    """A memfd full of "t", and a private mapping of it."""
    descriptor = os.memfd_create(name)
    os.write(descriptor, b"t" * pages * PAGE)
    return descriptor, mmap.mmap(descriptor, pages * PAGE, flags=mmap.MAP_PRIVATE)


def test_what_was_written_over_a_template_is_found_and_nothing_else(tmp_path: Path) -> None:
    name = f"vmlab-test-{os.getpid()}"
    template, memory = mapped(name, 64)
    memory[3 * PAGE] = memory[3 * PAGE]  # the same byte: a page of its own all the same
    memory[10 * PAGE + 5 : 12 * PAGE + 7] = b"w" * (2 * PAGE + 2)
    assert memory[40 * PAGE] == ord("t")  # read only
    (found,) = private.private_memory(os.getpid(), name)
    assert found.template.samefile(f"/proc/self/fd/{template}")
    expected = bytes(memory)
    target = tmp_path / "copy"
    with target.open("w+b") as file:
        file.truncate(64 * PAGE)
        found.overlay(file.fileno(), go_on)
        written = target.read_bytes()
    own = [3, 10, 11, 12]
    for page in range(64):
        part = slice(page * PAGE, (page + 1) * PAGE)
        assert written[part] == (expected[part] if page in own else bytes(PAGE)), page
    memory.close()
    assert private.private_memory(os.getpid(), name) == []
    os.close(template)


def test_copying_what_was_written_can_be_stopped(tmp_path: Path) -> None:
    name = f"vmlab-stop-{os.getpid()}"
    template, memory = mapped(name, 2)
    memory[0] = 1

    def stop() -> None:
        raise InterruptedError

    (found,) = private.private_memory(os.getpid(), name)
    with (tmp_path / "copy").open("wb") as file, pytest.raises(InterruptedError):
        found.overlay(file.fileno(), stop)
    memory.close()
    os.close(template)


def test_memory_of_a_process_that_is_gone_is_an_error_and_not_empty() -> None:
    gone = private.PrivateMemory(1 << 22, Path("/none"), ((0, PAGE, 0),))
    with pytest.raises(OSError):
        gone.overlay(-1, go_on)
    with pytest.raises(OSError):
        private.private_memory(1 << 22, "x")
    # An address that is not mapped has no pages, and one behind the end no page map.
    with private._Outside(os.getpid()) as process:
        assert list(process.written(0, PAGE)) == []
        with pytest.raises(OSError):
            process.read(0, 1)


# ------------------------------------------------------------------- streams


HEAD = b"QEVM\0\0\0\3\7\0\0\0\1x"
SECTION = b"\0\0\0\2"
FOOTER = b"\x7e" + SECTION


def named(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def page(flags: int, name: str | None, contents: bytes) -> bytes:
    return struct.pack(">Q", 0x5000 | flags | (0 if name else 0x20)) + (
        (named(name) if name else b"") + contents
    )


def stream(*pages: bytes, blocks: tuple[str, ...] = ("ram0", "pc.bios")) -> bytes:
    """A stream with those blocks and pages, and one device."""
    sizes = b"".join(named(name) + struct.pack(">QQ", 1 << 20, 0) for name in blocks)
    total = struct.pack(">Q", len(blocks) << 20 | 4)
    end = struct.pack(">Q", 0x10) + FOOTER
    start = HEAD + b"\1" + SECTION + b"\3ram" + bytes(4) + b"\0\0\0\4"
    middle = b"\2" + SECTION + b"".join(pages) + end
    return start + total + sizes + end + middle + b"\3" + SECTION + end + b"\4device"


ROM = page(8, "pc.bios", b"r" * PAGE) + page(2, None, b"\0")


def test_small_blocks_are_the_stream_up_to_its_devices() -> None:
    whole = stream(ROM)
    found = private.small_blocks(whole, Architecture.X86_64)
    assert found is not None
    assert found.flash == frozenset()
    devices = b"QEVM\0\0\0\3\4other"
    made = found.stream(devices)
    assert made == whole.replace(b"\4device", b"\4other\6\0\0\0\2{}")
    # Pages of the guest's memory come before the others, in a part of their own.
    pages = page(8, "ram0", b"m" * PAGE)
    end = struct.pack(">Q", 0x10) + FOOTER
    assert found.stream(devices, pages) == made.replace(
        b"\2" + SECTION, b"\2" + SECTION + pages + end + b"\2" + SECTION, 1
    )
    assert private.small_blocks(found.stream(devices), Architecture.X86_64) == found


def test_what_was_written_is_carried_as_pages_unless_it_is_much() -> None:
    name = f"vmlab-carry-{os.getpid()}"
    template, memory = mapped(name, 16)
    (found,) = private.private_memory(os.getpid(), name)
    assert private.carried([found], 0) == b""
    memory[PAGE : PAGE + 2] = b"ab"
    memory[2 * PAGE] = ord("c")
    memory[9 * PAGE] = ord("d")
    expected = struct.pack(">Q", PAGE | 8) + named("ram0") + memory[PAGE : 2 * PAGE]
    for number in (2, 9):
        contents = memory[number * PAGE : (number + 1) * PAGE]
        expected += struct.pack(">Q", number * PAGE | 0x28) + contents
    assert private.carried([found], 3 * PAGE) == expected
    assert private.carried([found], 3 * PAGE - 1) is None
    twice = private.carried([found, found], 3 * PAGE)
    assert twice == expected + expected.replace(b"ram0", b"ram1")
    memory.close()
    os.close(template)


@pytest.mark.parametrize(
    ("pages", "architecture", "flash"),
    [
        (page(2, "virt.flash0", b"\0"), Architecture.RISCV64, {"virt.flash0"}),
        (page(2, "virt.flash0", b"\xff"), Architecture.RISCV64, None),
        (page(8, "virt.flash0", bytes(PAGE)), Architecture.RISCV64, None),
        (page(2, "virt.flash0", b"\0"), Architecture.X86_64, None),
        (page(2, "vga.vram", b"\0"), Architecture.X86_64, None),
        (page(8, "ram0", bytes(PAGE)), Architecture.X86_64, None),
        (page(0x40, "pc.bios", b"?"), Architecture.X86_64, None),
        (b"", Architecture.X86_64, set()),
    ],
)
def test_blocks_that_a_guest_can_write_to_are_not_taken_from_an_old_stream(
    pages: bytes, architecture: Architecture, flash: set[str] | None
) -> None:
    found = private.small_blocks(stream(pages), architecture)
    assert (None if found is None else found.flash) == flash


def test_streams_of_another_form_are_refused() -> None:
    good = stream(ROM)
    for bad in (
        b"",
        HEAD,
        good.replace(FOOTER, b"\x7e\0\0\0\7"),
        good.replace(b"\3" + SECTION, b"\5" + SECTION),
    ):
        assert private.small_blocks(bad, Architecture.X86_64) is None


@given(st.integers(0, len(stream(ROM)) - 1), st.binary(max_size=9))
def test_damaged_streams_never_raise(where: int, what: bytes) -> None:
    good = stream(ROM)
    private.small_blocks(good[:where] + what, Architecture.X86_64)
    private.small_blocks(good[:where] + what + good[where + len(what) :], Architecture.RISCV64)


class Emulator:
    """Answers for a QEMU whose flash memory is a buffer of this process's."""

    def __init__(self, tmp_path: Path, answer: str) -> None:
        self.process = type("Process", (), {"pid": os.getpid()})
        self.answer = answer
        self.asked: list[str] = []

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        self.asked.append(command)
        if command == "xen-save-devices-state":
            file = Path(arguments["filename"])
            await asyncio.to_thread(file.write_bytes, b"QEVM\0\0\0\3\4devices\0")
            return {}
        return self.answer


def save(emulator: Emulator, directory: Path) -> bytes:
    blocks = private.SmallBlocks(b"", b"", b"", frozenset({"virt.flash0"}))
    return asyncio.run(private.save_devices(emulator, directory, blocks))


def test_devices_are_saved_only_while_the_flash_memory_is_empty(tmp_path: Path) -> None:
    flash = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(flash))
    there = f"Host virtual address for 0x20000000 (virt.flash0) is {address:#x}\r\n"
    expected = b"QEVM\0\0\0\3\4devices\0"
    assert save(Emulator(tmp_path, there), tmp_path) == expected
    assert flash[PAGE] == 0
    flash[5 * PAGE] = 0  # written, and empty all the same
    assert save(Emulator(tmp_path, there), tmp_path) == expected
    flash[31 << 20] = 7
    emulator = Emulator(tmp_path, there)
    with pytest.raises(private.Unusual, match="was written to"):
        save(emulator, tmp_path)
    assert "xen-save-devices-state" not in emulator.asked
    for other in ("Memory at address 0x20000000 is not RAM", there.replace("flash0", "flash1")):
        with pytest.raises(private.Unusual, match="is not where it should be"):
            save(Emulator(tmp_path, other), tmp_path)
    assert list(tmp_path.iterdir()) == []
