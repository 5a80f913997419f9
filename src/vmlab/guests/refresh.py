"""What a guest that was restored or forked has to be told: the time, who it is, and new entropy.

Two clones of one memory draw the same random numbers until their kernels are seeded anew. Where a
machine has a VM generation id (QEMU's q35: `vmgenid`, new in every process that loads a state)
Linux 5.18 and later does so by itself when the clone runs. Everywhere else, and beside it,
`refresh` gives the kernel the host's random bytes by RNDADDENTROPY and has it use them at once by
RNDRESEEDCRNG (random(4)); what is written to /dev/urandom, or comes from virtio-rng, is used up to
a minute later. No shell can call ioctl(2), so the guest is sent a program of some 300 bytes that is
nothing but those two calls and the bytes.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from vmlab.guests.command import quote
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import OperationFailed

if TYPE_CHECKING:
    from vmlab.guests.guest import Guest

SEED_BYTES: Final = 64
"""Bytes of entropy that a guest is given: twice the size of its generator's key."""

_BASE: Final = 0x10000
_HEADERS: Final = 64 + 56
_CODE: Final = _BASE + _HEADERS

# include/uapi/linux/random.h; powerpc has its own bits for directions (asm/ioctl.h).
_ADD_ENTROPY: Final = 0x40085203
_RESEED: Final = 0x5207
_ADD_ENTROPY_PPC: Final = 0x80085203
_RESEED_PPC: Final = 0x20005207

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")


def _x86_64(data: int) -> bytes:
    """ioctl (16) twice and exit (60): number in eax, arguments in edi, esi, edx; ebx is kept."""

    def move(opcode: int, value: int) -> bytes:
        return struct.pack("<BI", opcode, value)

    def ioctl(request: int, argument: int) -> bytes:
        words = move(0xBF, 0) + move(0xBE, request) + move(0xBA, argument) + move(0xB8, 16)
        return words + b"\x0f\x05"

    return (
        ioctl(_ADD_ENTROPY, data)
        + b"\x89\xc3"  # mov ebx, eax
        + ioctl(_RESEED, 0)
        + b"\x09\xc3\x89\xdf"  # or ebx, eax; mov edi, ebx
        + move(0xB8, 60)
        + b"\x0f\x05"
    )


def _riscv64(data: int) -> bytes:
    """ioctl (29) twice and exit (93): number in a7 (x17), arguments in a0 to a2; s0 is kept."""

    def load(register: int, value: int) -> list[int]:
        upper, lower = (value + 0x800) >> 12, value & 0xFFF
        lui = (upper & 0xFFFFF) << 12 | register << 7 | 0x37
        return [lui, lower << 20 | register << 15 | register << 7 | 0x13]

    def ioctl(request: int, argument: int) -> list[int]:
        words = load(10, 0) + load(11, request) + load(12, argument) + load(17, 29)
        return [*words, 0x00000073]

    words = [*ioctl(_ADD_ENTROPY, data), 0x00050413]  # mv s0, a0
    words += [*ioctl(_RESEED, 0), 0x00856533]  # or a0, a0, s0
    words += [*load(17, 93), 0x00000073]
    return struct.pack(f"<{len(words)}I", *words)


def _aarch64(data: int) -> bytes:
    """ioctl (29) twice and exit (93): number in x8, arguments in x0 to x2; x9 is kept."""

    def load(register: int, value: int) -> list[int]:
        movz = 0x52800000 | (value & 0xFFFF) << 5 | register
        return [movz, 0x72A00000 | (value >> 16) << 5 | register]

    def ioctl(request: int, argument: int) -> list[int]:
        words = load(0, 0) + load(1, request) + load(2, argument) + load(8, 29)
        return [*words, 0xD4000001]

    words = [*ioctl(_ADD_ENTROPY, data), 0xAA0003E9]  # mov x9, x0
    words += [*ioctl(_RESEED, 0), 0xAA090000]  # orr x0, x0, x9
    words += [*load(8, 93), 0xD4000001]
    return struct.pack(f"<{len(words)}I", *words)


def _ppc64le(data: int) -> bytes:
    """ioctl (54) twice and exit (1): number in r0, arguments in r3 to r5; r31 is kept."""

    def load(register: int, value: int) -> list[int]:
        lis = 0x3C000000 | register << 21 | value >> 16
        return [lis, 0x60000000 | register << 21 | register << 16 | value & 0xFFFF]

    def ioctl(request: int, argument: int) -> list[int]:
        return [*load(3, 0), *load(4, request), *load(5, argument), *load(0, 54), 0x44000002]

    words = [*ioctl(_ADD_ENTROPY_PPC, data), 0x7C7F1B78]  # mr r31, r3
    words += [*ioctl(_RESEED_PPC, 0), 0x7C63FB78]  # or r3, r3, r31
    words += [*load(0, 1), 0x44000002]
    return struct.pack(f"<{len(words)}I", *words)


# Code, ELF machine (elf(5), EM_*), and e_flags (2 is powerpc's ELFv2).
_PROGRAMS: Final = {
    Architecture.X86_64: (_x86_64, 62, 0),
    Architecture.RISCV64: (_riscv64, 243, 0),
    Architecture.AARCH64: (_aarch64, 183, 0),
    Architecture.PPC64LE: (_ppc64le, 21, 2),
}


def reseed_program(architecture: Architecture, seed: bytes) -> bytes:
    """A static ELF program that seeds the kernel's generator through its standard input.

    That has to be /dev/random or /dev/urandom; its status is 0 if the kernel took the seed.
    """
    code, machine, flags = _PROGRAMS[architecture]
    start = -(-(_CODE + len(code(0))) // 8) * 8
    body = code(start).ljust(start - _CODE, b"\0")
    body += struct.pack("<ii", 8 * len(seed), len(seed)) + seed  # struct rand_pool_info
    size = _HEADERS + len(body)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, _CODE, 64, 0, flags, 64, 56, 1, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return header + body


# A directory may be mounted noexec (status 126), and a shell may have no test for that.
_RESEED_SCRIPT: Final = """s=1 f=
for d in /run /dev/shm /tmp /var/tmp /root; do
    [ -d "$d" ] && [ -w "$d" ] || continue
    if [ -n "$f" ]; then
        mv "$f" "$d/{name}" || continue
        f=$d/{name}
    else
        f=$d/{name}
        trap 'rm -f "$f"' EXIT
        take >"$f" || exit
    fi
    chmod 700 "$f"
    "$f" </dev/urandom
    s=$?
    [ $s = 126 ] || break
done
exit $s
"""

_CLOCK: Final = "date -u -s @{exact} >/dev/null 2>&1 || date -u -s @{rounded} >/dev/null || exit"

_NAME: Final = """echo {name} >/proc/sys/kernel/hostname || exit
if [ -e /etc/hostname ]; then
    echo {name} >/etc/hostname
fi"""

# systemd keeps a copy for D-Bus where that has one of its own.
_ID: Final = """echo {id} >/etc/machine-id || exit
if [ -f /var/lib/dbus/machine-id ] && ! [ -L /var/lib/dbus/machine-id ]; then
    echo {id} >/var/lib/dbus/machine-id
fi"""

# A driver that came up after the copy was made has read the new one by itself.
_ADDRESS: Final = """n= d=
for i in /sys/class/net/*; do
    read -r a <"$i/address" || continue
    [ "$a" = {new} ] && d=yes
    [ "$a" = {old} ] && n=${{i##*/}} && break
done
[ -n "$n$d" ] || {{ echo "no network interface has the address {old}" >&2; exit 1; }}
[ -z "$n" ] || ip link set dev "$n" address {new} 2>/dev/null || {{
    ip link set dev "$n" down && ip link set dev "$n" address {new} && ip link set dev "$n" up
}} || exit"""


async def refresh(
    guest: Guest,
    *,
    hostname: str | None,
    machine_id: str | None,
    macs: Mapping[str, str],
    timeout: float,
) -> None:
    """See `Guest.refresh`."""
    script = [
        *([_NAME.format(name=_checked("hostname", hostname, _HOSTNAME))] if hostname else []),
        *([_ID.format(id=_checked("machine_id", machine_id, _MACHINE_ID))] if machine_id else []),
        *(
            _ADDRESS.format(old=_checked("macs", old, _MAC), new=_checked("macs", new, _MAC))
            for old, new in macs.items()
        ),
    ]
    seed = reseed_program(guest.machine.spec.architecture, os.urandom(SEED_BYTES))
    name = f".vmlab-{secrets.token_hex(6)}"
    # First of all: nothing may draw random numbers that its siblings draw as well.
    await guest.give(_RESEED_SCRIPT.format(name=name), seed, timeout=timeout)
    now = time.time()
    script.append(_CLOCK.format(exact=f"{now:.3f}", rounded=round(now)))
    await guest.succeed("\n".join(script), timeout=timeout)


def _checked(field: str, value: str, form: re.Pattern[str]) -> str:
    if form.fullmatch(value) is None:
        examples = {
            "hostname": '"clone-1"',
            "machine_id": "32 lower-case hexadecimal digits",
            "macs": '{"52:54:00:00:00:01": "52:54:00:00:00:02"}, in lower case',
        }
        raise OperationFailed(
            f"refresh: {field} has {value!r}",
            hint=f"such as {examples[field]}",
            operation="refresh",
        )
    return quote(value) if field != "macs" else value
