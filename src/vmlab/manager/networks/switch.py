"""A switch with VLANs (IEEE 802.1Q): Open vSwitch with its datapath in user space, of our own.

For kernels whose bridges have no VLAN filtering and that have no openvswitch module, as well as
for those that have. One database and one daemon for a home, in a directory of their own and beside
any Open vSwitch of the kernel's datapath that the host runs; they live on while no manager runs.
A network namespace has one datapath in user space, whose tap has a fixed name: who comes second is
refused. Its interfaces are taps that stay when the daemon is killed, so whoever ends it removes
them. See ovs-vswitchd.conf.db(5).
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Final

from vmlab.hypervisors.monitored.commands import run_command
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.processes import OwnedProcess, adopt, spawn
from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks import links

__all__ = ["PROGRAMS", "Switch"]

PROGRAMS: Final = ("ovsdb-tool", "ovsdb-server", "ovs-vsctl", "ovs-vswitchd")
"""What is needed of Open vSwitch."""

_SCHEMA: Final = Path("/usr/share/openvswitch/vswitch.ovsschema")
_DATAPATH: Final = "ovs-netdev"
"""The tap of the datapath in user space (dpif-netdev.c); Open vSwitch names it."""
_PROCESSES: Final = 2
_SECONDS: Final = 120
_LOOK_SECONDS: Final = 0.05


class Switch:
    """The switch of a home.

    Args:
        directory: Its own.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._owner = Owner("store", "network-switch", directory)
        self._lock = asyncio.Lock()

    def processes(self) -> list[OwnedProcess]:
        """Its processes that run."""
        return adopt(self._owner) if self.directory.exists() else []

    @property
    def works(self) -> bool:
        """Whether all of it runs: half of it, as a crash leaves it, answers nobody."""
        return len(self.processes()) == _PROCESSES

    async def up(self) -> None:
        """Have it run; what ran already stays, with its ports.

        Raises:
            OperationFailed: Open vSwitch is not installed, or does not start.
        """
        async with self._lock:
            if self.works:
                return
            await self._down()
            for program in PROGRAMS:
                if shutil.which(program) is None:
                    raise OperationFailed(
                        f"networks with a VLAN need {program}, which is not installed",
                        hint="install openvswitch-switch",
                    )
            there = (await asyncio.to_thread(links.links)).get(_DATAPATH)
            if there is not None and there.carrier:
                raise OperationFailed(
                    "another Open vSwitch has the datapath in user space, of which a network "
                    f"namespace has one (its interface is {_DATAPATH})",
                    hint="networks with a VLAN are possible in one home of a host at a time",
                )
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._begin()

    async def _begin(self) -> None:
        database, socket = self.directory / "conf.db", self._socket
        # What it was is in the store, so it begins with nothing.
        await self._run("ovsdb-tool", "create", str(database), str(_SCHEMA))
        server = await self._spawn(
            "ovsdb-server", str(database), f"--remote=punix:{socket}", "--no-chdir"
        )
        await self._until(server, socket)
        await self.control("--no-wait", "init")
        await self._spawn("ovs-vswitchd", f"unix:{socket}", "--no-chdir", "--disable-system")
        await self.control("show")

    async def down(self) -> None:
        """End it and remove all that it has; again does nothing."""
        async with self._lock:
            await self._down()

    async def _down(self) -> None:
        # The daemon first: it complains of a database that goes away.
        for process in sorted(self.processes(), key=lambda each: each.argv[0], reverse=True):
            await process.end()
        if not self.directory.exists():
            return
        there = (await asyncio.to_thread(links.links)).get(_DATAPATH)
        if there is not None and there.kind == "tun" and not there.carrier:
            # Nobody has it open: it is what a daemon left that was killed.
            await asyncio.to_thread(links.remove, _DATAPATH)
        await asyncio.to_thread(shutil.rmtree, self.directory)

    async def add_bridge(self, name: str) -> None:
        """Have a bridge of that name; one that is there stays."""
        await self.control(
            "--may-exist", "add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"
        )

    async def add_port(self, bridge: str, name: str, tag: int) -> None:
        """Make an interface that is on a bridge with a tag; one that is there gets that tag.

        Args:
            bridge: Its bridge.
            name: Of the interface.
            tag: VLAN of its untagged frames, the only one that it is in.
        """
        if name not in await asyncio.to_thread(links.links):
            # One that somebody took from the host is in the database still, and stays as it is.
            await self.control("--if-exists", "del-port", name)
        words = ["--may-exist", "add-port", bridge, name, "--", "set", "port", name, f"tag={tag}"]
        await self.control(*words, "--", "set", "interface", name, "type=internal")

    async def remove_port(self, name: str) -> None:
        """Remove an interface that it made; again does nothing."""
        if self.works:
            await self.control("--if-exists", "del-port", name)
        await asyncio.to_thread(links.remove, name)

    async def bridges(self) -> list[str]:
        """The bridges that it has; none while it does not run."""
        return (await self.control("list-br")).split() if self.works else []

    async def remove_bridge(self, name: str) -> None:
        """Remove a bridge with its ports; again does nothing."""
        if self.works:
            await self.control("--if-exists", "del-br", name)
        await asyncio.to_thread(links.remove, name)

    async def control(self, *words: str) -> str:
        """What ovs-vsctl(8) says; it waits until the daemon has done what it was told.

        Raises:
            OperationFailed: it could not be done.
        """
        return await self._run(
            "ovs-vsctl", f"--db=unix:{self._socket}", f"--timeout={_SECONDS}", *words
        )

    @property
    def _socket(self) -> Path:
        return self.directory / "db.sock"

    async def _run(self, *words: str) -> str:
        try:
            status, said, complaint = await run_command(*words)
        except FileNotFoundError as error:
            raise OperationFailed(
                f"{words[0]} is not installed", hint="install openvswitch-switch"
            ) from error
        # ovs-vsctl(8) ends well also where the daemon could not do what it was told.
        if status != 0 or "Error detected" in complaint:
            raise OperationFailed(
                f"{' '.join(words)} failed: {complaint or said}",
                hint=f"logs of the switch are in {self.directory}",
            )
        return said

    async def _spawn(self, *words: str) -> OwnedProcess:
        log = self.directory / f"{words[0]}.log"
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "OVS_RUNDIR": str(self.directory),
            "OVS_LOGDIR": str(self.directory),
            "OVS_DBDIR": str(self.directory),
        }
        return await spawn(
            words, owner=self._owner, stdout=log, stderr=log, cwd=self.directory,
            environment=environment,
        )  # fmt: skip

    async def _until(self, process: OwnedProcess, path: Path) -> None:
        """Wait for a socket to be there."""
        there, log = path.exists, self.directory / f"{process.argv[0]}.log"
        async with asyncio.timeout(_SECONDS):
            while not there():
                if not process.running:
                    said = (await asyncio.to_thread(log.read_text, "utf-8", "replace"))[-2000:]
                    raise OperationFailed(f"{process.argv[0]} ended: {said.strip()}")
                await asyncio.sleep(_LOOK_SECONDS)
