"""Networks: a segment of several guests, and taps and bridges of the host."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.hypervisors.reaper import reap_dead_runs

# A copy's kernel has its origin's MAC address until it is told: `vmlab.guests` does that.
UP = (
    "ip link set eth0 down; ip addr flush dev eth0; ip link set eth0 address {mac}; "
    "ip link set eth0 up; ip addr add 10.9.0.{number}/24 dev eth0"
)


@pytest.mark.boots
@pytest.mark.slow
def test_every_machine_of_a_segment_hears_every_other(booted: Any) -> None:
    async def test() -> None:
        machines = [await booted.machine() for _ in range(3)]
        for number, (machine, shell) in enumerate(machines, 1):
            mac = next(nic.mac for nic in (await machine.info()).nics if nic.name == "lan")
            await shell.run(UP.format(mac=mac, number=number))
        for number, (_, shell) in enumerate(machines, 1):
            for other in {1, 2, 3} - {number}:
                await shell.run(
                    f"for try in 1 2 3 4 5 6 7 8; do ping -c 1 -W 5 10.9.0.{other} && exit; done"
                )

    booted.run(test())


SCRIPT = """
    import asyncio, os, sys
    from pathlib import Path
    from vmlab.hypervisors.ownership import Home, Run
    from vmlab.hypervisors.qemu import provider
    from vmlab.machine.spec import MachineSpec

    async def main():
        lease = Run.begin(Home.open(Path(sys.argv[1])), reap=False)
        async with provider.open(lease.owner) as qemu:
            spec = MachineSpec.of(name="a", architecture="x86_64", memory="32M", channels=(),
                nics=[{"name": "one", "network": "bridge:vmlbr"},
                      {"name": "two", "network": "tap:vmltap"}])
            machine = await qemu.create(spec)
            await machine.start()
            again = await qemu.create(spec.with_changes(name="b", nics=[
                {"name": "one", "network": "bridge:vmlbr"}]))
            await again.start()
            fork = await again.fork("c")
            print("ready", (await machine.info()).pid, flush=True)
            await asyncio.to_thread(sys.stdin.readline)
        lease.close()
        print("closed", flush=True)

    asyncio.run(main())
"""


class Namespace:
    """A network namespace of the test's own, with a bridge in it and vmlab beside that."""

    def __init__(self, home: Path) -> None:
        setup = 'ip link add vmlbr type bridge && ip link set vmlbr up && exec "$@"'
        script = textwrap.dedent(SCRIPT)
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", setup, "-", sys.executable, "-c", script, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout
        first = self.said.readline().split()
        assert first[:1] == ["ready"], first
        # Keeps the namespace when all others have left it.
        self.namespace = os.open(f"/proc/{first[1]}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def links(self) -> dict[str, dict[str, Any]]:
        """The namespace's network interfaces by name."""
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}", "ip", "-j", "link"],
            capture_output=True,
            check=True,
        )
        return {link["ifname"]: link for link in json.loads(done.stdout)}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.namespace)


@pytest.fixture
def namespace(tmp_path: Path) -> Any:
    if os.geteuid() != 0:
        pytest.skip("taps and bridges need root")
    for program in ("unshare", "nsenter", "ip"):
        assert shutil.which(program), f"{program} is not installed: see tools/"
    made = Namespace(tmp_path)
    yield made
    made.close()


def ports(links: dict[str, dict[str, Any]]) -> list[str]:
    """The bridge's ports."""
    return sorted(name for name, link in links.items() if link.get("master") == "vmlbr")


def until_gone(namespace: Namespace) -> None:
    """Wait until only what was there before is left."""

    async def wait() -> None:
        async with asyncio.timeout(60):
            while set(namespace.links()) - {"lo", "vmlbr"}:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.1)

    asyncio.run(wait())


def test_taps_are_made_put_on_their_bridge_and_gone_with_the_run(namespace: Namespace) -> None:
    links = namespace.links()
    assert len(ports(links)) == 3
    for name in (*ports(links), "vmltap"):
        assert "UP" in links[name]["flags"] or name == "vmltap", links[name]
    assert namespace.process.stdin is not None
    namespace.process.stdin.write("\n")
    namespace.process.stdin.flush()
    assert namespace.said.readline() == "closed\n"
    assert namespace.process.wait() == 0
    until_gone(namespace)


def test_nothing_of_a_killed_run_is_left_on_its_bridge(
    namespace: Namespace, tmp_path: Path
) -> None:
    assert len(ports(namespace.links())) == 3
    os.kill(namespace.process.pid, signal.SIGKILL)
    namespace.process.wait()
    until_gone(namespace)
    reap_dead_runs(Home.open(tmp_path))
    assert not list((tmp_path / "runs").iterdir())
