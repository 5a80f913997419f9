"""How the suite handles QEMU: a tiny Debian guest that answers by vmlab's agent.

The guest's own view comes out of /proc, /sys and its devices; what such a guest cannot tell is
skipped and reported as skipped.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from vmlab.conformance.probe import GuestCannotTell, GuestDisk, GuestNic, GuestNode
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.guest import Guest
from vmlab.guests.shares import mount_shares
from vmlab.hypervisors.base import Hypervisor, Machine, Snapshot
from vmlab.machine.architecture import Architecture, host_architecture, parse_architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import ChannelClosed, InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.sizes import GIB, KIB, MIB
from vmlab.machine.spec import Boot, Disk, MachineSpec, Nic

_IMAGES: Final = {
    Architecture.X86_64: "debian-12-amd64-tiny",
    Architecture.RISCV64: "debian-13-riscv64-tiny",
    Architecture.AARCH64: "debian-13-arm64-tiny",
    Architecture.PPC64LE: "debian-13-ppc64el-tiny",
}
_CONNECT: Final = 300.0
"""Seconds that a guest has to boot, several at once on a slow host."""
_MEMORY_FILE: Final = "/dev/shm/conformance"
_NO_PACKETS: Final = "a tiny image has no program for packets of its own"
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

    async def ask(self, command: str, data: bytes | None = None) -> bytes:
        """What a command prints in the guest.

        Raises:
            ChannelClosed: the guest died.
            OperationFailed: the command failed.
        """
        guest = Guest(self._machine, AgentChannel(self._machine.channel))
        try:
            await guest.connect(timeout=_CONNECT)
            result = await guest.execute(command, input=data, timeout=_CONNECT)
        finally:
            await guest.close()
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
        raise GuestCannotTell("QEMU tells a guest no name")

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
        return await self.ask(
            f"dd if={device} iflag=skip_bytes,count_bytes bs=64k skip={offset} count={length} "
            "2>/dev/null"
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
        raise GuestCannotTell("what is typed goes to the shell on its console")

    async def show(self, text: str) -> None:
        if self._machine.spec.architecture is not Architecture.X86_64:
            # Their kernels have the drivers of displays in modules, which the images have not.
            raise GuestCannotTell
        await self.ask("cat > /dev/tty1", f"\n{text}\n".encode())

    async def pressed(self) -> Sequence[str]:
        raise GuestCannotTell

    async def read_file(self, path: str) -> bytes:
        return await self.ask(f"cat '{path}'")

    async def mount_shares(self) -> None:
        guest = Guest(self._machine, AgentChannel(self._machine.channel))
        try:
            await guest.connect(timeout=_CONNECT)
            await mount_shares(guest, self._machine.spec.shares)
        finally:
            await guest.close()

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
        raise GuestCannotTell(_NO_PACKETS)

    async def received(self, nic: str) -> Sequence[bytes]:
        raise GuestCannotTell(_NO_PACKETS)


def _scsi_target(row: str) -> int:
    """The target in a row that ends in HOST:CHANNEL:TARGET:LUN; -1 for another kind of disk."""
    address = row.rpartition("/")[2].split(":")
    return int(address[2]) if len(address) == 4 else -1


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


async def corrupt(hypervisor: Hypervisor, machine: Machine, snapshot: Snapshot) -> None:
    """Flip a bit in each of a snapshot's files."""
    directory = (await machine.info()).directory
    assert directory is not None
    for path in (directory / "snapshots" / snapshot.name).iterdir():
        if path.suffix != ".json" and (size := path.stat().st_size):
            with path.open("r+b") as file:
                file.seek(size // 2)
                (byte,) = file.read(1)
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))


def make_profile(architecture: Architecture) -> ConformanceProfile:
    """The profile for guests of that architecture; their image is built if it is not there."""
    from vmlab.images import ImageStore

    image = ImageStore().ensure(_IMAGES[architecture])
    never = {
        Capability.SHARE_VIRTIOFS,
        Capability.SHARE_COPY,
        Capability.GPU_PASSTHROUGH,
        Capability.SRIOV_PASSTHROUGH,
        Capability.DETERMINISTIC,
    }
    if architecture is not Architecture.X86_64:
        never |= {Capability.HOTPLUG_VCPU, Capability.HOTPLUG_MEMORY}
    if architecture in {Architecture.RISCV64, Architecture.PPC64LE}:
        never.add(Capability.HOTPLUG_NIC)
    if architecture is Architecture.RISCV64:
        # Linux hangs with the interrupt controller that QEMU's board has for each node.
        never.add(Capability.NUMA)
    if architecture is Architecture.PPC64LE:
        # Their decrementer is lost before QEMU 8.2 (vmlab.hypervisors.qemu.timers).
        never |= {Capability.MEMORY_SNAPSHOT, Capability.FORK, Capability.LIVE_MIGRATION}
    bus: Final = "virtio" if architecture is Architecture.X86_64 else "scsi"
    return ConformanceProfile(
        hypervisor="qemu",
        options={"architecture": architecture.value},
        spec=MachineSpec(
            name="conformance",
            architecture=architecture,
            memory={"size": 192 * MIB},
            boot=Boot(kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline),
            disks=(
                Disk(name="data", size=64 * MIB, serial="data", bus=bus),
                Disk(name="extra", size=32 * MIB, serial="extra", bus=bus),
            ),
            nics=(Nic(name="net", network="segment:conformance"),),
            channels=CHANNELS,
        ),
        scratch=("data", "extra"),
        probe=AgentProbe,
        corrupt=corrupt,
        must_declare=frozenset(set(Capability) - never),
        sizes=((1, 192 * MIB), (2, 512 * MIB), (4, GIB)),
        many=8,
        cancel_points=(0.0, 0.5),
        settle=1.0,
        slack=300.0,
        lag=10.0,
        patience=1800.0,
        variant=for_options,
    )


def for_options(options: Mapping[str, str]) -> ConformanceProfile:
    """The profile for guests of the architecture that the options name.

    Raises:
        InvalidSpec: there is no such architecture.
    """
    name = options["architecture"]
    try:
        return make_profile(parse_architecture(name))
    except ValueError as error:
        raise InvalidSpec(
            [SpecProblem("architecture", name, str(error))], hypervisor="qemu"
        ) from error


def __getattr__(name: str) -> ConformanceProfile:
    """`profile` is made when it is asked for: it needs an image."""
    if name == "profile":
        return make_profile(host_architecture() or Architecture.X86_64)
    raise AttributeError(name)
