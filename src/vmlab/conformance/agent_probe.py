"""The probe of a guest with vmlab's agent and a shell, as the tiny images are.

The guest's own view comes out of /proc, /sys and its devices; what such a guest cannot tell is
said, with why. What it does with its devices on the suite's behalf is in `agent_devices`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from vmlab.conformance import agent_devices
from vmlab.conformance.probe import GuestCannotTell, GuestDisk, GuestNic, GuestNode
from vmlab.guests.agent import AgentChannel
from vmlab.guests.guest import Guest
from vmlab.guests.shares import mount_shares
from vmlab.hypervisors.base import Machine
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed
from vmlab.machine.sizes import GIB, KIB, MIB, format_size

_CONNECT: Final = 900.0
"""Seconds that a guest has to boot: several at once, emulated, on a host that is busy besides."""
_EXCERPT: Final = 2000
_SECTOR: Final = 512
_LARGEST_BLOCK: Final = 256 * MIB
"""Bytes of a memory block by which the suite's NUMA nodes can be told apart."""
_MEMORY_FILE: Final = "/dev/shm/conformance"
_UNNAMED: Final = "vmlab"
"""What a tiny image is called where nobody has told it a name (images/tiny/init.sh)."""
_MEMORY_DEVICE: Final = 17
"""The SMBIOS structure of a memory module (SMBIOS 3.0, 7.18)."""
_MODULE_SIZE: Final = 0x0C
_NOT_IN_MIB: Final = 0x8000
_VCPU_THREAD: Final = re.compile(r"CPU (\d+)/")
"""The name of a vCPU's thread, given debug-threads=on (QEMU's accel/*/*-accel-ops.c)."""


class AgentProbe:
    """The probe of a guest with vmlab's agent; each question connects anew.

    Args:
        machine: Whose guest is asked.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @asynccontextmanager
    async def _guest(self) -> AsyncIterator[Guest]:
        guest = Guest(self._machine, AgentChannel(self._machine.channel))
        try:
            try:
                await guest.connect(timeout=_CONNECT)
            except DeadlineExceeded as error:
                error.add_note(await self._last_seen())
                raise
            yield guest
        finally:
            await guest.close()

    async def _last_seen(self) -> str:
        """What a guest that does not answer was seen to do last, for whoever reads the report."""
        state = (await self._machine.status()).state.value
        if not self._machine.spec.consoles:
            return f"the machine is {state}, and has no console"
        async with await self._machine.console() as console:
            log = (await console.log())[-_EXCERPT:].decode(errors="replace")
        return f"the machine is {state}; the end of its console:\n{log}"

    async def ask(self, command: str, data: bytes | None = None) -> bytes:
        """What a command prints in the guest.

        Raises:
            ChannelClosed: the guest died.
            OperationFailed: the command failed.
        """
        async with self._guest() as guest:
            result = await guest.execute(command, input=data, timeout=_CONNECT)
        if result.status:
            raise OperationFailed(
                f"{command!r} failed in the guest with status {result.status}: {result.stderr}",
                machine=self._machine.name,
            )
        return result.stdout_bytes

    async def _text(self, command: str) -> str:
        return (await self.ask(command)).decode().strip()

    async def vcpus(self) -> int:
        # What udev's rules do on larger systems with a vCPU that has come.
        return int(
            await self._text(
                "for c in /sys/devices/system/cpu/cpu[1-9]*/online; do "
                '[ -e $c ] && [ "$(cat $c)" = 0 ] && echo 1 >$c; done; nproc'
            )
        )

    async def memory(self) -> int:
        table = await self.ask("cat /sys/firmware/dmi/tables/DMI 2>/dev/null || true")
        if not table:
            # A board without SMBIOS has a device tree: an address and a size in each range.
            ranges = await self.ask(
                "cat /sys/firmware/devicetree/base/memory@*/reg 2>/dev/null || true"
            )
            if not ranges:
                raise GuestCannotTell("its board has neither SMBIOS nor a device tree")
            return sum(size for _, size in struct.iter_unpack(">QQ", ranges))
        at_boot = memory_of_smbios(table)
        # The table is of the boot; what came later is behind 4 GiB (QEMU's pc_memory_init).
        blocks = (
            await self._text(
                "cd /sys/devices/system/memory && cat block_size_bytes && "
                "for m in memory[0-9]*; do cat $m/state $m/phys_index; done"
            )
        ).split()
        size = int(blocks[0], 16)
        later = [
            index
            for state, index in zip(blocks[1::2], blocks[2::2], strict=True)
            if state == "online" and int(index, 16) * size >= 4 * GIB
        ]
        return at_boot + size * len(later)

    async def memory_left(self) -> int:
        found = await self._text("grep MemTotal: /proc/meminfo")
        return int(found.split()[1]) * KIB

    async def architecture(self) -> str:
        return await self._text("uname -m")

    async def hostname(self) -> str:
        name = await self._text("cat /proc/sys/kernel/hostname")
        if name == _UNNAMED:
            raise GuestCannotTell("nobody has told it: the hypervisor has no way to")
        return name

    async def _disks(self) -> dict[str, tuple[str, int, bool]]:
        """Name -> device, bytes, whether it is read-only; the serial number is the name.

        SCSI disks are in the order of their targets: their letters are dealt out as they answer.
        """
        rows = await self._text(
            "for d in /sys/block/[vs]d*; do [ -e $d ] || continue; n=${d##*/}; "
            "s=$(cat $d/serial 2>/dev/null) || s=$(dd if=$d/device/vpd_pg80 bs=1 skip=4 "
            '2>/dev/null); echo "$s" $n $(cat $d/size $d/ro) $(readlink $d/device); done'
        )
        found = {}
        for row in sorted(rows.splitlines(), key=_scsi_target):
            name, device, sectors, readonly, _ = row.split()
            found[name] = (device, int(sectors) * 512, readonly == "1")
        return found

    async def disks(self) -> Sequence[GuestDisk]:
        found = await self._disks()
        return [GuestDisk(name, size, readonly) for name, (_, size, readonly) in found.items()]

    async def nics(self) -> Sequence[GuestNic]:
        # A guest does not know the names: they are told apart by what the hypervisor says.
        names = {nic.mac: nic.name for nic in (await self._machine.info()).nics}
        rows = await self._text(
            "for n in /sys/class/net/*; do [ ${n##*/} = lo ] && continue; "
            "ip link set ${n##*/} up; echo $(cat $n/address $n/carrier); done"
        )
        found = []
        for row in rows.splitlines():
            mac, carrier = row.split()
            found.append(GuestNic(names.get(mac, mac), mac, carrier == "1"))
        return found

    async def nodes(self) -> Sequence[GuestNode]:
        # MemTotal is less than what there is by what the kernel has reserved: blocks are counted,
        # so that a node of no whole number of them looks larger.
        rows = await self._text(
            "cat /sys/devices/system/memory/block_size_bytes 2>/dev/null || echo 0; "
            "for n in /sys/devices/system/node/node[0-9]*; do "
            "echo $(ls -d $n/memory[0-9]* 2>/dev/null | wc -l) $(cat $n/cpulist); done"
        )
        block, *nodes = rows.splitlines()
        if int(block, 16) == 0:
            raise GuestCannotTell("its kernel has no memory blocks")
        if int(block, 16) > _LARGEST_BLOCK:
            size = format_size(int(block, 16))
            raise GuestCannotTell(f"its kernel has memory in blocks of {size} only")
        found = [row.partition(" ") for row in nodes]
        return [
            GuestNode(int(count) * int(block, 16), parse_cpus(cpus)) for count, _, cpus in found
        ]

    async def pinning(self) -> Mapping[int, tuple[int, ...]]:
        # What the host's kernel says of the threads, whose names QEMU gives them.
        pid = (await self._machine.info()).pid
        assert pid is not None
        return _bound(pid)

    async def read_memory(self, offset: int, length: int) -> bytes:
        found = await self.ask(
            f"[ ! -e {_MEMORY_FILE} ] || dd if={_MEMORY_FILE} iflag=skip_bytes,count_bytes bs=64k "
            f"skip={offset} count={length} 2>/dev/null"
        )
        # What nobody has written since the guest booted is empty.
        return found.ljust(length, b"\0")

    async def write_memory(self, offset: int, data: bytes) -> None:
        await self.ask(
            f"dd of={_MEMORY_FILE} oflag=seek_bytes bs=64k seek={offset} conv=notrunc 2>/dev/null",
            data,
        )

    async def _device(self, disk: str) -> str:
        found = await self._disks()
        if disk not in found:
            raise OperationFailed(
                f"the guest has no disk {disk!r}, but {', '.join(found) or 'none'}",
                machine=self._machine.name,
            )
        return f"/dev/{found[disk][0]}"

    async def read_disk(self, disk: str, offset: int, length: int) -> bytes:
        device = await self._device(disk)
        # Past the guest's cache, which reads ahead, and again what could not be read.
        whole = ",direct" if offset % _SECTOR == length % _SECTOR == 0 else ""
        return await self.ask(
            f"dd if={device} iflag=skip_bytes,count_bytes{whole} bs=64k skip={offset} "
            f"count={length} 2>/dev/null"
        )

    async def write_disk(self, disk: str, offset: int, data: bytes) -> None:
        device = await self._device(disk)
        await self.ask(f"dd of={device} oflag=seek_bytes bs=64k seek={offset} conv=notrunc", data)

    async def flush(self, disk: str) -> None:
        device = await self._device(disk)
        await self.ask(f"dd if=/dev/null of={device} count=0 conv=notrunc,fsync 2>/dev/null")

    async def ticks(self) -> int:
        return int(float((await self._text("cat /proc/uptime")).split()[0]) * 1000)

    async def clock(self) -> float:
        return float(await self._text("date +%s"))

    async def entropy(self) -> bytes:
        return await self.ask("head -c 16 /dev/urandom")

    async def print(self, text: str) -> None:
        await self.ask("cat > /dev/console", f"\n{text}\n".encode())

    async def typed(self) -> bytes:
        return await self.ask(agent_devices.TYPED)

    async def show(self, text: str) -> None:
        if self._machine.spec.architecture is Architecture.X86_64:
            await self.ask("cat > /dev/tty1", f"\n{text}\n".encode())
        else:
            # Their kernels have the drivers of displays in modules, which the images have not.
            await self.ask(agent_devices.drawing(text))

    async def pressed(self) -> Sequence[str]:
        return agent_devices.chords(await self.ask(agent_devices.PRESSED))

    async def read_file(self, path: str) -> bytes:
        return await self.ask(f"cat '{path}'")

    async def mount_shares(self) -> None:
        async with self._guest() as guest:
            await mount_shares(guest, self._machine.spec.shares)

    async def become(self, origin: Machine) -> None:
        before = {nic.name: nic.mac for nic in (await origin.info()).nics}
        now = (await self._machine.info()).nics
        macs = {before[nic.name]: nic.mac for nic in now if before[nic.name] != nic.mac}
        async with self._guest() as guest:
            await guest.refresh(hostname=self._machine.name, macs=macs, timeout=_CONNECT)

    async def panic(self, message: str) -> None:
        await self.print(message)
        await self._end("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")

    async def poweroff(self) -> None:
        await self._end("poweroff -f")

    async def _end(self, command: str) -> None:
        """Run what the guest does not survive, a moment after the answer is out."""
        try:
            await self.ask(f"(usleep 200000; {command}) >/dev/null 2>&1 &")
        except ChannelClosed:
            # It ended before its answer was out, which is what it was asked to do.
            return

    async def ignore_powerdown(self, on: bool) -> None:
        # It is started while the first commands run already.
        gone = "n=0; until killall acpid || [ $((n += 1)) = 100 ]; do usleep 100000; done"
        await self.ask(f"{gone} 2>/dev/null; true" if on else "acpid -d >/dev/null 2>&1 & true")

    async def send(self, nic: str, data: bytes) -> None:
        network, mac = await self._wire(self._machine, nic)
        for other in await self._machine.hypervisor.list():
            for each in other.spec.nics:
                if each.network == network and (other.id, each.name) != (self._machine.id, nic):
                    _, to = await self._wire(other, each.name)
                    await self.ask(agent_devices.sending(mac, to), data)

    async def received(self, nic: str) -> Sequence[bytes]:
        _, mac = await self._wire(self._machine, nic)
        found = await self._text(agent_devices.receiving(mac))
        return [bytes.fromhex(packet) for packet in found.split()]

    async def _wire(self, machine: Machine, name: str) -> tuple[str, str]:
        """The network of a machine's NIC, and its MAC address."""
        (found,) = [nic for nic in (await machine.info()).nics if nic.name == name]
        return found.network, found.mac

    async def echo(self, channel: str) -> None:
        await self.ask(agent_devices.echoing(channel))


def _scsi_target(row: str) -> float:
    """The target in a row that ends in HOST:CHANNEL:TARGET:LUN; other kinds of disk come after."""
    address = row.rpartition("/")[2].split(":")
    return int(address[2]) if len(address) == 4 else math.inf


def _bound(pid: int) -> dict[int, tuple[int, ...]]:
    """vCPU -> CPUs of the host that its thread may run on."""
    found = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        vcpu = _VCPU_THREAD.match((thread / "comm").read_text("utf-8", "replace"))
        if vcpu:
            found[int(vcpu[1])] = tuple(sorted(os.sched_getaffinity(int(thread.name))))
    return found


def parse_cpus(text: str) -> tuple[int, ...]:
    """The numbers in a list like "0-2,5" (cpuset(7), "List format")."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def memory_of_smbios(table: bytes) -> int:
    """The bytes of all memory modules in an SMBIOS table.

    Raises:
        GuestCannotTell: there are none: the guest's board has no SMBIOS.
    """
    total, position = 0, 0
    while position + 4 <= len(table):
        kind, length = table[position], table[position + 1]
        if length < 4:
            break
        if kind == _MEMORY_DEVICE and position + _MODULE_SIZE + 2 <= len(table):
            (size,) = struct.unpack_from("<H", table, position + _MODULE_SIZE)
            if size < _NOT_IN_MIB - 1:
                total += size * MIB
        # The strings of a structure follow it, and end with two zero bytes.
        end = table.find(b"\0\0", position + length)
        if end < 0:
            break
        position = end + 2
    if not total:
        raise GuestCannotTell
    return total
