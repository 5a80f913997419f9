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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.store import IMAGE_STORE

from vmlab.hypervisors.monitored.networks import segment_group
from vmlab.hypervisors.ownership import Home
from vmlab.hypervisors.reaper import reap_dead_runs
from vmlab.images import ImageStore

# A copy's kernel has its origin's MAC address until it is told: `vmlab.guests` does that.
UP = (
    "ip link set {card} down; ip addr flush dev {card}; ip link set {card} address {mac}; "
    "ip link set {card} up; ip addr add {address}/24 dev {card}"
)


ECHO = "nc -ll -p 7 -e sh -c 'echo I am {name}; exec cat' </dev/null >/dev/null 2>&1 &"
"""Says who it is to everybody who connects, then what that one says."""


async def joined(machine: Any, shell: Any, nic: str, address: str) -> None:
    """Give a machine its address on a network."""
    nics = (await machine.info()).nics
    number, mac = next((n, one.mac) for n, one in enumerate(nics) if one.name == nic)
    await shell.run(UP.format(card=f"eth{number}", mac=mac, address=address))


async def heard(shell: Any, number: int) -> None:
    """Have a machine hear another one; a frame may be lost, as on a real segment."""
    await shell.run(f"for try in 1 2 3 4 5 6 7 8; do ping -c 1 -W 5 10.9.0.{number} && exit; done")


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_machine_of_a_segment_hears_every_other_and_nobody_of_another_lab(
    booted: Any, new_bench: Any
) -> None:
    other_lab = new_bench()

    async def test() -> None:
        machines = [await booted.machine() for _ in range(4)]
        for number, (machine, shell) in enumerate(machines[:3], 1):
            await joined(machine, shell, "lan", f"10.9.0.{number}")
        for number, (_, shell) in enumerate(machines[:3], 1):
            for other in {1, 2, 3} - {number}:
                await heard(shell, other)
        # A megabyte over TCP, in both directions at once.
        (_, one), (_, two), _, _ = machines
        made = "dd if=/dev/urandom of=/tmp/sent bs=64k count=16 2>/dev/null"
        await two.run(
            f"{made}; (nc -l -p 9 </tmp/sent >/tmp/got; touch /tmp/over) >/dev/null 2>&1 &"
        )
        await one.run(f"{made}; until nc 10.9.0.2 9 </tmp/sent >/tmp/got; do sleep 0.1; done")
        await two.run("until [ -e /tmp/over ]; do sleep 0.1; done")
        digests = [
            (await shell.run("cd /tmp; md5sum sent got")).split()[::2] for shell in (one, two)
        ]
        assert digests[0] == digests[1][::-1]
        # The same segment, the same address, but another lab.
        machine, _ = machines[3]
        there = await machine.migrate(other_lab.qemu)
        away = type(one)(there)
        assert segment_group(other_lab.qemu.owner, "lan") != segment_group(booted.qemu.owner, "lan")
        await two.run("ip link set eth0 down")
        await joined(there, away, "lan", "10.9.0.2")
        refused = await one.run("arp -d 10.9.0.2; ping -c 3 -W 2 10.9.0.2 || echo nobody")
        assert "nobody" in refused
        refused = await away.run("ping -c 3 -W 2 10.9.0.1 || echo nobody")
        assert "nobody" in refused
        await other_lab.qemu.close()

    booted.run(test(), 800)
    other_lab.lease.close()


async def said_by(port: int) -> list[bytes]:
    """What is said behind a port of the host to some words; nothing if nobody listens yet.

    QEMU takes the connection all the same, and hangs up or resets it then.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"some words\n")
        said = await reader.readline()
        return [said, await reader.readline()] if said else []
    except ConnectionError:
        return []
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ports_of_the_host_lead_into_each_guest_and_no_two_machines_have_the_same(
    booted: Any,
) -> None:
    async def test() -> None:
        ports = {}
        for _ in range(2):
            machine, shell = await booted.machine()
            (forward,) = next(nic.forwards for nic in (await machine.info()).nics if nic.forwards)
            assert forward[::2] == ("tcp", 7)
            ports[machine.name] = forward[1]
            await joined(machine, shell, "wan", "10.0.2.15")
            await shell.run(ECHO.format(name=machine.name))
        assert len(set(ports.values())) == 2
        for name, port in ports.items():
            async with asyncio.timeout(150):
                while not (said := await said_by(port)):  # noqa: ASYNC110 (the guest tells nobody)
                    await asyncio.sleep(0.1)
            assert said == [f"I am {name}\n".encode(), b"some words\n"]

    booted.run(test(), 800)


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
        pytest.skip("needs root, for taps and bridges")
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
        async with asyncio.timeout(150):
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


TRAFFIC = """
    import asyncio, subprocess, sys
    from pathlib import Path
    from vmlab.guests.agent import CHANNELS, AgentChannel
    from vmlab.guests.guest import Guest
    from vmlab.hypervisors.ownership import Home, Run
    from vmlab.hypervisors.qemu import provider
    from vmlab.machine.spec import MachineSpec

    async def main():
        home, kernel, initrd, cmdline = sys.argv[1:]
        with Run.begin(Home.open(Path(home)), reap=False) as run:
            async with provider.open(run.owner) as qemu:
                await traffic(qemu, {"kernel": kernel, "initrd": initrd, "cmdline": cmdline})

    async def booted(qemu, boot, name, *networks):
        machine = await qemu.create(MachineSpec.of(
            name=name, architecture="x86_64", memory="256M", channels=CHANNELS, boot=boot,
            nics=[{"name": f"n{n}", "network": each} for n, each in enumerate(networks)]))
        await machine.start()
        guest = Guest(machine, AgentChannel(machine.channel))
        await guest.connect(timeout=600)
        return guest

    async def traffic(qemu, boot):
        one = await booted(qemu, boot, "one", "bridge:vmlbr", "tap:vmltap")
        two = await booted(qemu, boot, "two", "bridge:vmlbr")
        for line in ("addr add 10.8.0.1/24 dev vmlbr", "addr add 10.7.0.1/24 dev vmltap",
                     "link set vmltap up"):
            subprocess.run(["ip", *line.split()], check=True)
        up = "ip addr add {}/24 dev eth{} && ip link set eth{} up"
        await one.succeed(up.format("10.8.0.2", 0, 0))
        await one.succeed(up.format("10.7.0.2", 1, 1))
        await two.succeed(up.format("10.8.0.3", 0, 0))
        for guest, address in ((one, "10.8.0.1"), (one, "10.7.0.1"), (two, "10.8.0.2")):
            await guest.succeed(f"ping -c 3 -w 200 {address}")
        heard = asyncio.get_running_loop().create_future()

        async def hear(reader, writer):
            heard.set_result(await reader.read())
            writer.close()

        async with await asyncio.start_server(hear, "10.8.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await two.succeed(f"seq 20000 | nc 10.8.0.1 {port}", timeout=300)
            async with asyncio.timeout(300):
                print(len(await heard), "bytes")
        for guest in (one, two):
            await guest.close()

    asyncio.run(main())
"""


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for taps and bridges")
def test_guests_reach_the_host_and_each_other_over_a_bridge_and_a_tap(tmp_path: Path) -> None:
    image = ImageStore(IMAGE_STORE).ensure("debian-12-amd64-tiny")
    setup = (
        'ip link set lo up && ip link add vmlbr type bridge && ip link set vmlbr up && exec "$@"'
    )
    script = textwrap.dedent(TRAFFIC)
    done = subprocess.run(
        [
            *("unshare", "--net", "sh", "-c", setup, "-", sys.executable, "-c", script),
            *(tmp_path, image.kernel, image.initrd, f"console=ttyS0 {image.cmdline}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{sum(len(str(n)) + 1 for n in range(1, 20_001))} bytes\n"
