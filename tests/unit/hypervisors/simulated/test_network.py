"""Frames arrive where they should and nowhere else; ports of the host have one user."""

from __future__ import annotations

import pytest

from vmlab.hypervisors.simulated.network import QUEUE, Ports, SimulatedNic
from vmlab.machine.errors import ResourceExhausted
from vmlab.machine.spec import Nic


def test_a_frame_reaches_every_other_nic_of_its_network_and_no_other(live, spec, probe):
    async def body(hv):
        asks = {}
        for name, network in (("a", "segment:x"), ("b", "segment:x"), ("c", "segment:y")):
            machine = await hv.create(
                spec(
                    name, nics=[{"name": "n", "network": network}, {"name": "m", "network": "none"}]
                )
            )
            await machine.start()
            asks[name] = await probe.of(machine)
        off = await hv.create(spec("off", nics=[{"name": "n", "network": "segment:x"}]))
        assert await asks["a"]("send", nic="n", data="0102") == 1
        assert await asks["b"]("received", nic="n") == ["0102"]
        assert await asks["b"]("received", nic="n") == []
        assert await asks["a"]("received", nic="n") == []
        assert await asks["c"]("received", nic="n") == []
        # No link, no peers.
        assert await asks["a"]("send", nic="m", data="03") == 0
        metrics = (await (await hv.get("a")).metrics()).nics
        assert (metrics[0].sent_packets, metrics[0].sent_bytes) == (1, 2)
        assert metrics[1].dropped_packets == 1
        received = (await (await hv.get("b")).metrics()).nics[0]
        assert (received.received_packets, received.received_bytes) == (1, 2)
        await off.start()
        assert await (await probe.of(off))("received", nic="n") == []

    live(body)


def test_two_nics_of_one_machine_hear_each_other(live, spec, probe):
    async def body(hv):
        nics = [{"name": name, "network": "segment:x"} for name in "nm"]
        machine = await hv.create(spec(nics=nics))
        await machine.start()
        ask = await probe.of(machine)
        assert await ask("send", nic="n", data="aa") == 1
        assert await ask("received", nic="m") == ["aa"]

    live(body)


def test_what_goes_to_the_outside_counts_and_reaches_nobody(live, spec, probe):
    async def body(hv):
        asks = []
        for name in "ab":
            machine = await hv.create(spec(name, nics=[{"name": "n", "network": "user"}]))
            await machine.start()
            asks.append(await probe.of(machine))
        assert await asks[0]("send", nic="n", data="aa") == 0
        assert await asks[1]("received", nic="n") == []
        assert (await (await hv.get("a")).metrics()).nics[0].sent_packets == 1

    live(body)


def test_a_paused_machine_keeps_its_frames_until_its_queue_is_full():
    nic = SimulatedNic("n", "segment:x", "52:54:00:00:00:01")
    for number in range(QUEUE + 2):
        nic.deliver(bytes([number % 256]))
    assert (len(nic.inbox), nic.received_packets, nic.dropped_packets) == (QUEUE, QUEUE, 2)


def test_addresses_come_from_name_and_seed_and_differ(live, spec):
    seen = []

    async def body(hv):
        machines = [await hv.create(spec(f"vm{number}")) for number in range(20)]
        macs = [(await machine.info()).nics[0].mac for machine in machines]
        assert len(set(macs)) == 20
        given = await hv.create(spec("given", nics=[{"name": "net", "mac": "52:54:00:aa:bb:cc"}]))
        assert (await given.info()).nics[0].mac == "52:54:00:aa:bb:cc"
        await machines[0].start()
        fork = await machines[0].fork("fork")
        assert (await fork.info()).nics[0].mac not in macs
        seen.append(macs)

    live(body, seed=1)
    live(body, seed=2)
    assert seen[0] == seen[1], "a machine's own seed makes them, not the hypervisor's"


def test_an_address_that_is_taken_is_not_given_again(live, spec):
    async def body(hv):
        first = await hv.create(spec("vm"))
        mac = (await first.info()).nics[0].mac
        await first.delete()
        await hv.create(spec("other", nics=[{"name": "net", "mac": mac}]))
        again = await hv.create(spec("vm"))
        assert (await again.info()).nics[0].mac != mac

    live(body)


def test_a_port_has_one_user_and_comes_back(live, spec):
    def forwarding(name, host):
        forwards = [{"guest": 22, "host": host}, {"guest": 53, "host": host, "protocol": "udp"}]
        return spec(name, nics=[{"name": "n", "forwards": forwards}])

    async def body(hv):
        first = await hv.create(forwarding("a", 8022))
        assert (await first.info()).nics[0].forwards == (("tcp", 8022, 22), ("udp", 8022, 53))
        with pytest.raises(ResourceExhausted, match=r"8022/tcp .* 'a'"):
            await hv.create(forwarding("b", 8022))
        assert len(hv.world.ports) == 2
        free = await hv.create(forwarding("c", 0))
        assert len({port for _, port, _ in (await free.info()).nics[0].forwards}) == 1
        await first.start()
        fork = await first.fork("fork")
        taken = (await fork.info()).nics[0].forwards
        assert taken[0][1] not in (0, 8022), "a copy takes another port where its own is in use"
        await first.unplug_nic("n")
        plugged = await free.plug_nic(Nic(name="m", forwards=[{"guest": 1, "host": 8022}]))
        assert plugged.forwards == (("tcp", 8022, 1),)

    live(body)


def test_ports_run_out():
    ports = Ports(1)
    ports.take("tcp", 0, "a")
    with pytest.raises(ResourceExhausted, match="all 1 ports"):
        ports.take("tcp", 0, "b")
    ports.free("tcp", 20_000)
    assert ports.take("tcp", 0, "b") == 20_000
