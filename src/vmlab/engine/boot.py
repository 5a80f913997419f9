"""Loading a guest: Linux Image (bare, compressed, or wrapped for EFI), ELF, raw; where things lie.

Linux's Documentation/arch/riscv/boot-image-header.rst and boot.rst; the zboot header is in
drivers/firmware/efi/libstub/zboot-header.S. Files may come from anybody: every length is checked.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from vmlab.engine.memory.ram import Ram
from vmlab.machine.errors import VmlabError

KERNEL_OFFSET: Final = 0x20_0000
"""An S-mode payload begins 2 MiB into RAM, where OpenSBI puts it as well."""
_ALIGNMENT: Final = 0x20_0000
_PAGE: Final = 4096
_IMAGE_HEADER: Final = struct.Struct("<IIQQQIIQQII")
_IMAGE_MAGIC: Final = 0x0543_5352  # "RSC\x05"
_ZBOOT: Final = struct.Struct("<4s4sII8s32s")
_ELF_MACHINE_RISCV: Final = 243
_ELF_LOAD: Final = 1
_FW_DYNAMIC_MAGIC: Final = 0x4942_534F
_FW_DYNAMIC_VERSION: Final = 2

Kind = Literal["image", "elf", "raw"]


class BootError(VmlabError):
    """The guest cannot be loaded."""


@dataclass(frozen=True)
class Loaded:
    """A kernel in memory: its kind, where it is entered, and what it occupies."""

    kind: Kind
    entry: int
    start: int
    end: int


@dataclass(frozen=True)
class Boot:
    """How the first hart begins.

    Attributes:
        entry: Physical address of the first instruction.
        device_tree: Physical address of the device tree: register a1; a0 is the hart's number.
        firmware_info: Register a2: OpenSBI's fw_dynamic information, or 0.
        machine_mode: Whether it begins in M mode, with firmware of its own, or in S mode.
        kernel: What was loaded as the kernel.
    """

    entry: int
    device_tree: int
    firmware_info: int
    machine_mode: bool
    kernel: Loaded | None


def unpack(data: bytes, limit: int) -> bytes:
    """The kernel inside an EFI zboot image or a compressed file; anything else as it is.

    Args:
        data: The file.
        limit: Bytes that fit into the guest's memory; more than that is refused.

    Raises:
        BootError: it is damaged, too large, or compressed with something that is not known here.
    """
    for _ in range(4):  # an EFI application around gzip around an Image, and one to spare
        if data[:2] == b"MZ" and data[4:8] == b"zimg":
            if len(data) < _ZBOOT.size:
                raise BootError("the EFI kernel is cut off", hint="get the file anew")
            _, _, offset, size, _, name = _ZBOOT.unpack_from(data)
            if offset + size > len(data):
                raise BootError(
                    f"the EFI kernel says that {size} bytes at {offset} are its payload, and has "
                    f"{len(data)} bytes",
                    hint="the file is cut off: get it anew",
                )
            method = name.split(b"\0", 1)[0].decode("ascii", "replace")
            data = _decompress(method, data[offset : offset + size], limit)
        elif data[:2] == b"\x1f\x8b":
            data = _decompress("gzip", data, limit)
        elif data[:4] == b"\x28\xb5\x2f\xfd":
            data = _decompress("zstd", data, limit)
        elif data[:6] == b"\xfd7zXZ\0":
            data = _decompress("xz", data, limit)
        else:
            return data
    raise BootError("the kernel is compressed within compressed", hint="unpack it first")


def _decompress(method: str, data: bytes, limit: int) -> bytes:
    try:
        if method == "gzip":
            plain = zlib.decompressobj(wbits=31).decompress(data, limit + 1)
        elif method in {"zstd", "zstd22"}:
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
                plain = reader.read(limit + 1)
        elif method in {"xz", "xzkern", "lzma"}:
            import lzma

            plain = lzma.LZMADecompressor().decompress(data, limit + 1)
        else:
            raise BootError(
                f"the kernel is compressed with {method!r}, which is not known here",
                hint="unpack it first; gzip, zstd, xz and lzma are known",
            )
    except BootError:
        raise
    except Exception as error:  # each library has its own, some several
        raise BootError(
            f"the {method} data of the kernel is damaged: {error}", hint="get the file anew"
        ) from None
    if len(plain) > limit:
        raise BootError(
            f"the kernel has more than the {limit} bytes of the guest's memory when unpacked",
            hint="give the machine more memory",
        )
    return plain


def load_kernel(ram: Ram, data: bytes) -> Loaded:
    """Put a kernel into memory.

    Raises:
        BootError: it is damaged, for another machine, or does not fit.
    """
    data = unpack(data, ram.size)
    if data[:4] == b"\x7fELF":
        return load_elf(ram, data)
    start = ram.base + KERNEL_OFFSET
    if len(data) >= _IMAGE_HEADER.size and struct.unpack_from("<I", data, 56)[0] == _IMAGE_MAGIC:
        _, _, text_offset, image_size, flags, *_ = _IMAGE_HEADER.unpack_from(data)
        if flags & 1:
            raise BootError("the kernel is for a big-endian machine", hint="use one for riscv64")
        # The offset is from the start of RAM; below 2 MiB there is nothing to boot from.
        start = ram.base + max(text_offset, KERNEL_OFFSET)
        _put(ram, start, data, "kernel", max(image_size, len(data)))
        return Loaded("image", start, start, start + max(image_size, len(data)))
    if data[:2] == b"MZ":
        raise BootError(
            "the kernel is an EFI application that holds no RISC-V Image",
            hint="use the riscv64 kernel's Image, vmlinux, or its EFI zboot form",
        )
    _put(ram, start, data, "kernel", len(data))
    return Loaded("raw", start, start, start + len(data))


def _put(ram: Ram, address: int, data: bytes, what: str, size: int) -> None:
    if not data:
        raise BootError(f"the {what} is empty", hint="check the file")
    if not ram.contains(address, size):
        raise BootError(
            f"the {what} needs {size} bytes at {address:#x}, and memory ends at {ram.end:#x}",
            hint="give the machine more memory",
        )
    ram.load_image(address, data)


def load_elf(ram: Ram, data: bytes) -> Loaded:
    """Put the loadable segments of a riscv64 ELF file at their physical addresses.

    Raises:
        BootError: it is damaged, for another machine, or does not fit.
    """
    hint = "use an executable for riscv64 that is linked for 0x80000000 and above"
    if len(data) < 64 or data[4] != 2 or data[5] != 1:
        raise BootError("the ELF file is not a 64-bit little-endian one", hint=hint)
    kind, machine = struct.unpack_from("<HH", data, 16)
    entry, table = struct.unpack_from("<QQ", data, 24)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    if machine != _ELF_MACHINE_RISCV or kind not in {2, 3}:
        raise BootError(f"the ELF file (type {kind}, machine {machine}) is no RISC-V program",
                        hint=hint)  # fmt: skip
    if entry_size < 56 or table + entry_size * count > len(data):
        raise BootError("the ELF file's program headers are cut off", hint="get the file anew")
    low, high, physical_entry = ram.end, ram.base, entry
    for index in range(count):
        segment, _, offset, virtual, physical, file_size, memory_size, _ = struct.unpack_from(
            "<IIQQQQQQ", data, table + index * entry_size
        )
        if segment != _ELF_LOAD or memory_size == 0:
            continue
        if file_size > memory_size or offset + file_size > len(data):
            raise BootError("a segment of the ELF file is cut off", hint="get the file anew")
        if not ram.contains(physical, memory_size):
            raise BootError(
                f"the ELF file wants {memory_size} bytes at {physical:#x}, and memory is "
                f"{ram.base:#x} to {ram.end - 1:#x}",
                hint=hint + ", or give the machine more memory",
            )
        ram.load_image(physical, data[offset : offset + file_size])
        ram.zero(physical + file_size, memory_size - file_size)
        low, high = min(low, physical), max(high, physical + memory_size)
        if virtual <= entry < virtual + memory_size:
            physical_entry = entry - virtual + physical
    if low >= high:
        raise BootError("the ELF file has nothing to load", hint=hint)
    return Loaded("elf", physical_entry, low, high)


def place(
    ram: Ram,
    device_tree: Callable[[tuple[int, int] | None], bytes],
    *,
    kernel: bytes | None,
    initrd: bytes = b"",
    firmware: bytes | None = None,
) -> Boot:
    """Load everything that a guest begins with.

    The device tree is put at the end of memory, the initial RAM disk below it, both away from
    the kernel.

    Args:
        ram: The guest's memory.
        device_tree: Makes the tree, given where the initial RAM disk lies.
        kernel: The kernel's file, or None if the firmware is all there is.
        initrd: The initial RAM disk, if any.
        firmware: A payload for M mode, such as OpenSBI; None: the built-in SBI, from S mode.

    Raises:
        BootError: something is damaged or does not fit.
    """
    if kernel is None and firmware is None:
        raise BootError("there is nothing to boot", hint="give the machine a kernel")
    loaded = load_kernel(ram, kernel) if kernel is not None else None
    below = None
    if firmware is not None:
        if firmware[:4] == b"\x7fELF":
            below = load_elf(ram, firmware)
        else:
            _put(ram, ram.base, firmware, "firmware", len(firmware))
            below = Loaded("raw", ram.base, ram.base, ram.base + len(firmware))
        if loaded is not None and below.start < loaded.end and loaded.start < below.end:
            raise BootError(
                f"the firmware ({below.start:#x} to {below.end:#x}) and the kernel "
                f"({loaded.start:#x} to {loaded.end:#x}) overlap",
                hint="link one of them for another address",
            )
    taken = max(part.end for part in (loaded, below) if part is not None)
    tree_size = len(device_tree((0, 0) if initrd else None))
    tree_at = (ram.end - tree_size - _PAGE) & ~(_ALIGNMENT - 1)
    if tree_at < taken:  # little memory: as tight as it goes
        tree_at = (ram.end - tree_size - _PAGE) & ~(_PAGE - 1)
    initrd_at = (tree_at - len(initrd)) & ~(_PAGE - 1)
    if initrd_at < taken:
        raise BootError(
            f"the initial RAM disk of {len(initrd)} bytes and the device tree do not fit behind "
            f"the kernel, which ends at {taken:#x} of {ram.end:#x}",
            hint="give the machine more memory",
        )
    where = (initrd_at, initrd_at + len(initrd)) if initrd else None
    ram.load_image(initrd_at, initrd)
    tree = device_tree(where)
    ram.load_image(tree_at, tree)
    info = 0
    if firmware is not None:
        info = (tree_at + len(tree) + 7) & ~7
        next_entry = loaded.entry if loaded is not None else 0
        ram.load_image(
            info, struct.pack("<6Q", _FW_DYNAMIC_MAGIC, _FW_DYNAMIC_VERSION, next_entry, 1, 0, 0)
        )
    first = below or loaded
    if first is None:  # refused above
        raise BootError("there is nothing to boot", hint="give the machine a kernel")
    return Boot(first.entry, tree_at, info, firmware is not None, loaded)
