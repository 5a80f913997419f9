"""Telling kernels apart by their headers: architecture, image format, release.

Not a boot loader. Follows Documentation/arch/x86/boot.rst, arch/riscv/boot-image-header.rst and
arch/arm64/booting.rst of Linux, the ELF format for ppc64le, and include/linux/pe.h's zboot.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.errors import FormatError
from vmlab.images.formats.compression import decompress, decompressed, identify
from vmlab.machine.architecture import Architecture

_HEAD_BYTES = 64 << 10
_ELF_MACHINES = {
    21: Architecture.PPC64LE,
    62: Architecture.X86_64,
    183: Architecture.AARCH64,
    243: Architecture.RISCV64,
}
_XEN_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY, xen/include/public/elfnote.h
_SETUP_HEADER_END = 0x268  # boot.rst: after kernel_info_offset, since protocol 2.15
_VMLINUX_BYTES_AT_MOST = 1 << 30
_BANNER = re.compile(rb"Linux version (\d+\.\d+[^\s\0]{0,80}) ")


@dataclass(frozen=True)
class KernelInfo:
    """A kernel file: `form` is "bzImage", "Image", "vmlinux" or "zboot"; `release` may be ""."""

    architecture: Architecture
    form: str
    compression: str | None = None
    release: str = ""


def inspect(path: Path) -> KernelInfo:
    """What kind of kernel a file holds; a compressed `Image.gz` is looked into.

    Raises:
        FormatError: it is not a Linux kernel that vmlab knows.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        compression = identify(head)
        if compression is not None:
            file.seek(0)
            head = decompressed(file, source=path.name).read(_HEAD_BYTES)
    architecture, form = _form(head, path.name)
    if form == "bzImage":
        return KernelInfo(architecture, form, compression, _bzimage_release(head))
    return KernelInfo(architecture, form, compression, _banner_release(path))


def _form(head: bytes, source: str) -> tuple[Architecture, str]:
    if head[0x202:0x206] == b"HdrS" and len(head) >= _SETUP_HEADER_END:
        (flags,) = struct.unpack_from("<H", head, 0x236)
        if flags & 1:  # XLF_KERNEL_64
            return Architecture.X86_64, "bzImage"
        raise FormatError(f"{source} is a kernel for 32-bit x86", hint="give an x86_64 kernel")
    if head[4:8] == b"zimg" and head[:2] == b"MZ" and len(head) >= 64:
        return _pe_architecture(head, source), "zboot"
    if head[56:60] == b"ARM\x64":
        return Architecture.AARCH64, "Image"
    if head[48:56] == b"RISCV\0\0\0" and head[56:60] == b"RSC\x05":
        return Architecture.RISCV64, "Image"
    if head[:4] == b"\x7fELF" and len(head) >= 64:
        if head[4] != 2 or head[5] != 1:
            raise FormatError(f"{source} is not a 64-bit little-endian kernel")
        machine = _ELF_MACHINES.get(struct.unpack_from("<H", head, 18)[0])
        if machine is not None:
            return machine, "vmlinux"
    raise FormatError(
        f"{source} is not a Linux kernel that vmlab knows",
        hint="give a bzImage (x86_64), an Image (riscv64, aarch64) or a vmlinux (ppc64le)",
    )


def _pe_architecture(head: bytes, source: str) -> Architecture:
    (at,) = struct.unpack_from("<I", head, 0x3C)
    machines = {0xAA64: Architecture.AARCH64, 0x5064: Architecture.RISCV64,
                0x8664: Architecture.X86_64}  # fmt: skip
    if at + 6 <= len(head) and head[at : at + 4] == b"PE\0\0":
        found = machines.get(struct.unpack_from("<H", head, at + 4)[0])
        if found is not None:
            return found
    raise FormatError(f"{source} is an EFI kernel of an architecture that vmlab does not know")


def _bzimage_release(head: bytes) -> str:
    """boot.rst: kernel_version is a pointer, less 0x200, to "RELEASE (builder) #..."."""
    (pointer,) = struct.unpack_from("<H", head, 0x20E)
    text = head[pointer + 0x200 : pointer + 0x300].split(b"\0", 1)[0] if pointer else b""
    return text.split(b" ", 1)[0].decode("ascii", "replace")


def _banner_release(path: Path) -> str:
    """The release in `linux_banner`, which every kernel prints first."""
    tail = b""
    with path.open("rb") as file, decompressed(file, source=path.name) as stream:
        while chunk := stream.read(1 << 20):
            found = _BANNER.search(tail + chunk)
            if found is not None:
                return found[1].decode("ascii", "replace")
            tail = chunk[-256:]
    return ""


def direct_boot(path: Path) -> bytes | None:
    """The ELF kernel inside a bzImage, if a hypervisor can enter it directly (PVH), else None.

    An emulated CPU needs two seconds to decompress a kernel; a host needs half of one, once.

    Raises:
        FormatError: the bzImage is damaged.
    """
    image = path.read_bytes()
    if image[0x202:0x206] != b"HdrS" or len(image) < _SETUP_HEADER_END:
        return None
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)  # boot.rst: payload_offset, _length
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if identify(payload) is None:
        return None
    # The kernel's build appends the uncompressed size, four bytes that no format knows.
    vmlinux = decompress(payload[:-4], source=path.name, limit=_VMLINUX_BYTES_AT_MOST)
    return vmlinux if _enters_in_32_bit(vmlinux) else None


def _enters_in_32_bit(vmlinux: bytes) -> bool:
    """Whether an ELF kernel has the note that tells its PVH entry point.

    Searched as the note itself stands in the file, gABI 5 "Note Section": the name's size 4, the
    address's size, the type, and "Xen".
    """
    return any(
        struct.pack("<III", 4, size, _XEN_PHYS32_ENTRY) + b"Xen\0" in vmlinux for size in (4, 8)
    )
