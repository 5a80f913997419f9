"""Loading kernels of every wrapping, and where things lie afterwards."""

from __future__ import annotations

import gzip
import lzma
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from vmlab.engine.boot import BootError, load_elf, load_kernel, place, unpack
from vmlab.engine.memory.ram import RAM_BASE, Ram

MIB = 1 << 20
KERNEL = RAM_BASE + 2 * MIB


def image(
    size: int = 5000, image_size: int = 3 * MIB, flags: int = 0, offset: int = 2 * MIB
) -> bytes:
    header = struct.pack(
        "<IIQQQIIQQII", 0x5A4D, 0x106F, offset, image_size, flags, 2, 0, 0, 0x5643534952,
        0x05435352, 0x40,
    )  # fmt: skip
    return header + random.Random(2).randbytes(size)


def zboot(payload: bytes, method: str) -> bytes:
    head = struct.pack("<4s4sII8s32s", b"MZ\0\0", b"zimg", 4096, len(payload), b"", method.encode())
    return head.ljust(4096, b"\0") + payload + b"PE trailer"


WRAPPINGS = {
    "bare": lambda data: data,
    "gzip": gzip.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "xz": lzma.compress,
    "zboot-gzip": lambda data: zboot(gzip.compress(data), "gzip"),
    "zboot-zstd": lambda data: zboot(zstandard.ZstdCompressor().compress(data), "zstd22"),
    "zboot-lzma": lambda data: zboot(lzma.compress(data, lzma.FORMAT_ALONE), "lzma"),
    "zboot-xz": lambda data: zboot(lzma.compress(data), "xzkern"),
}


@pytest.fixture
def ram() -> Ram:
    return Ram(64 * MIB)


def five_times_compressed() -> bytes:
    """Without the time, which would be in the test's name and differ between processes."""
    data = b"x"
    for _ in range(5):
        data = gzip.compress(data, mtime=0)
    return data


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_image_is_loaded_whatever_it_is_wrapped_in(ram: Ram, wrapping: str) -> None:
    data = image()
    loaded = load_kernel(ram, WRAPPINGS[wrapping](data))
    assert (loaded.kind, loaded.entry, loaded.start) == ("image", KERNEL, KERNEL)
    assert loaded.end == KERNEL + 3 * MIB, "room for what is not in the file (.bss)"
    assert ram.read(KERNEL, len(data)) == data


def test_an_image_that_says_it_is_smaller_than_its_file_is_believed_in_part(ram: Ram) -> None:
    loaded = load_kernel(ram, image(image_size=10))
    assert loaded.end == KERNEL + 5064


def test_an_image_that_names_no_offset_is_put_where_the_others_are(ram: Ram) -> None:
    assert load_kernel(ram, image(offset=0)).start == KERNEL
    assert load_kernel(ram, image(offset=4 * MIB)).start == RAM_BASE + 4 * MIB


def test_what_is_nothing_known_is_loaded_raw(ram: Ram) -> None:
    loaded = load_kernel(ram, b"\x13\0\0\0" * 10)
    assert (loaded.kind, loaded.entry, loaded.end) == ("raw", KERNEL, KERNEL + 40)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is empty"),
        (image(flags=1), "big-endian"),
        (image(image_size=1 << 40), "needs"),
        (image(offset=1 << 60), "needs"),
        (b"MZ" + bytes(500), "no RISC-V Image"),
        (zboot(b"x" * 100, "gzip"), "damaged"),
        (zboot(b"x" * 100, "zstd"), "damaged"),
        (zboot(b"x" * 100, "lzma"), "damaged"),
        (zboot(b"x" * 100, "lz4"), "'lz4'"),
        (zboot(b"x" * 100, "gzip")[:4100], "says that"),
        (b"MZ\0\0zimg", "cut off"),
        (gzip.compress(bytes(65 * MIB), mtime=0), "more than"),
        (lzma.compress(bytes(65 * MIB)), "more than"),
        (zstandard.ZstdCompressor().compress(bytes(65 * MIB)), "more than"),
        (b"\x1f\x8b" + bytes(40), "damaged"),
        (five_times_compressed(), "within"),
        (b"\x7fELF\2\1" + bytes(20), "64-bit little-endian"),
        (b"\x7fELF\1\1" + bytes(100), "64-bit little-endian"),
    ],
)  # fmt: skip
def test_what_cannot_be_booted_is_refused_with_a_reason(
    ram: Ram, data: bytes, complaint: str
) -> None:
    with pytest.raises(BootError, match=complaint) as caught:
        load_kernel(ram, data)
    assert caught.value.hint


def elf(
    segments: list[tuple[int, int, bytes, int]], entry: int, machine: int = 243, kind: int = 2
) -> bytes:
    """(virtual, physical, content, memory size)."""
    offset = 64 + 56 * len(segments)
    headers, contents = b"", b""
    for virtual, physical, content, size in segments:
        at = offset + len(contents)
        headers += struct.pack("<IIQQQQQQ", 1, 7, at, virtual, physical, len(content), size, 4096)
        contents += content
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    return ident + head + headers + contents


def test_an_elf_file_lies_at_its_physical_addresses(ram: Ram) -> None:
    virtual = 0xFFFF_FFFF_8000_0000
    ram.write(RAM_BASE + 0x3000, b"x" * 0x2000)
    data = elf(
        [(virtual, RAM_BASE + 0x1000, b"code" * 10, 40),
         (virtual + 0x2000, RAM_BASE + 0x3000, b"data", 0x1000)],
        entry=virtual + 8,
    )  # fmt: skip
    loaded = load_kernel(ram, data)
    assert loaded.kind == "elf"
    assert loaded.entry == RAM_BASE + 0x1008
    assert (loaded.start, loaded.end) == (RAM_BASE + 0x1000, RAM_BASE + 0x4000)
    assert ram.read(RAM_BASE + 0x1000, 40) == b"code" * 10
    assert ram.read(RAM_BASE + 0x3000, 0x1001) == b"data" + bytes(0xFFC) + b"x"


def test_a_real_linker_makes_elf_files_that_are_loaded(ram: Ram, tmp_path: Path) -> None:
    tools = [shutil.which(f"riscv64-linux-gnu-{tool}") for tool in ("as", "ld")]
    if None in tools:
        pytest.skip("needs Debian's gcc-riscv64-linux-gnu")
    (tmp_path / "a.s").write_text(".globl _start\n_start: nop\nwfi\n.data\n.quad 0x1234\n")
    for command in (
        [tools[0], "-o", "a.o", "a.s"],
        [tools[1], "-Ttext=0x80001000", "-Tdata=0x80003000", "-o", "a", "a.o"],
    ):
        subprocess.run([str(part) for part in command], cwd=tmp_path, check=True, timeout=250)
    loaded = load_elf(ram, (tmp_path / "a").read_bytes())
    assert loaded.entry == 0x8000_1000
    assert ram.load32(0x8000_1000) & 0xFFFF == 0x0001 or ram.load32(0x8000_1000) == 0x13
    assert ram.load64(0x8000_3000) == 0x1234


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (elf([(0, RAM_BASE - 4096, b"x", 1)], 0), "wants"),
        (elf([(0, RAM_BASE, b"x", 1 << 40)], 0), "wants"),
        (elf([(0, RAM_BASE, b"xyz", 2)], 0), "cut off"),
        (elf([(0, RAM_BASE, b"x" * 100, 100)], 0)[:-1], "cut off"),
        (elf([], 0), "nothing to load"),
        (elf([(0, RAM_BASE, b"x", 1)], 0, machine=62), "no RISC-V"),
        (elf([(0, RAM_BASE, b"x", 1)], 0, kind=1), "no RISC-V"),
        (elf([(0, RAM_BASE, b"x", 1)], 0)[:70], "program headers"),
    ],
)
def test_elf_files_that_cannot_be_loaded_are_refused(ram: Ram, data: bytes, complaint: str) -> None:
    with pytest.raises(BootError, match=complaint) as caught:
        load_kernel(ram, data)
    assert caught.value.hint


def tree(initrd: tuple[int, int] | None) -> bytes:
    return b"TREE" + (struct.pack("<QQ", *initrd) if initrd else b"") + bytes(1000)


def test_nothing_lies_on_anything_else(ram: Ram) -> None:
    initrd = random.Random(4).randbytes(3 * MIB + 17)
    boot = place(ram, tree, kernel=image(), initrd=initrd)
    assert boot.entry == KERNEL and not boot.machine_mode and boot.firmware_info == 0
    start, end = struct.unpack("<QQ", ram.read(boot.device_tree + 4, 16))
    assert end - start == len(initrd)
    assert ram.read(start, len(initrd)) == initrd
    assert boot.kernel is not None
    assert boot.kernel.end <= start < end <= boot.device_tree < ram.end
    assert start % 4096 == 0 and boot.device_tree % 8 == 0


def test_a_small_machine_is_used_to_the_last_page() -> None:
    ram = Ram(6 * MIB)
    boot = place(ram, tree, kernel=image(image_size=3 * MIB), initrd=b"i" * 500_000)
    assert boot.kernel is not None and boot.device_tree > boot.kernel.end
    with pytest.raises(BootError, match="do not fit") as caught:
        place(ram, tree, kernel=image(image_size=3 * MIB), initrd=b"i" * 2 * MIB)
    assert "memory" in (caught.value.hint or "")
    with pytest.raises(BootError, match="nothing to boot"):
        place(ram, tree, kernel=None)


def test_opensbi_is_told_where_the_kernel_is(ram: Ram) -> None:
    boot = place(ram, tree, kernel=image(), firmware=b"firmware" * 100)
    assert boot.machine_mode
    assert boot.entry == RAM_BASE
    assert ram.read(RAM_BASE, 8) == b"firmware"
    magic, version, entry, mode, options, hart = struct.unpack(
        "<6Q", ram.read(boot.firmware_info, 48)
    )
    assert (magic, version, entry, mode, options, hart) == (0x4942534F, 2, KERNEL, 1, 0, 0)
    assert boot.device_tree + 1004 <= boot.firmware_info
    alone = place(ram, tree, kernel=None, firmware=elf([(RAM_BASE, RAM_BASE, b"f", 1)], RAM_BASE))
    assert alone.kernel is None and alone.entry == RAM_BASE
    with pytest.raises(BootError, match="overlap"):
        place(ram, tree, kernel=image(), firmware=bytes(3 * MIB))


def test_any_file_is_loaded_or_refused(ram: Ram) -> None:
    seeds = [WRAPPINGS[name](image(2000)) for name in WRAPPINGS]
    seeds.append(elf([(0, RAM_BASE, b"x" * 100, 200)], 0))
    noise = random.Random(6)
    outcomes = set()
    for _ in range(10_000):
        data = bytearray(noise.choice(seeds))
        for _ in range(noise.randrange(1, 5)):
            place_of = noise.randrange(min(len(data), 130 if noise.random() < 0.7 else len(data)))
            data[place_of] = noise.randrange(256)
        if noise.random() < 0.2:
            del data[noise.randrange(len(data)) :]
        try:
            outcomes.add(load_kernel(ram, bytes(data)).kind)
        except BootError as error:
            assert error.hint
            outcomes.add("refused")
    assert outcomes == {"image", "elf", "raw", "refused"}


def test_unpacking_leaves_what_is_not_packed() -> None:
    assert unpack(b"plain", 100) == b"plain"
