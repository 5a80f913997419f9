"""The simulated guest answers from its hardware, and its console behaves like one."""

from __future__ import annotations

import asyncio
import json

import pytest

from vmlab.hypervisors.simulated.clock import VIRTUAL_EPOCH
from vmlab.machine.errors import ChannelClosed, ResourceNotFound
from vmlab.machine.states import MachineState


def test_the_guest_tells_what_it_is_made_of(live, spec, probe):
    async def body(hv):
        machine = await hv.create(
            spec(
                architecture="riscv64",
                cpus={"count": 2, "pinning": {1: [3]}},
                memory={
                    "size": "64M",
                    "nodes": [{"memory": "48M", "cpus": [0]}, {"memory": "16M", "cpus": [1]}],
                },
                disks=[{"name": "data", "size": "1M", "bus": "scsi", "readonly": True}],
            )
        )
        await machine.start()
        ask = await probe.of(machine)
        assert await ask("vcpus") == 2
        assert await ask("memory") == 64 << 20
        assert await ask("architecture") == "riscv64"
        assert await ask("hostname") == "vm"
        assert await ask("disks") == [
            {"name": "data", "size": 1 << 20, "readonly": True, "bus": "scsi"}
        ]
        (nic,) = await ask("nics")
        assert (nic["name"], nic["link"], nic["network"]) == ("net", True, "segment:a")
        assert nic["mac"] == (await machine.info()).nics[0].mac
        assert await ask("nodes") == [
            {"memory": 48 << 20, "cpus": [0]},
            {"memory": 16 << 20, "cpus": [1]},
        ]
        assert await ask("pinning") == {"1": [3]}

    live(body)


def test_memory_and_disks_hold_what_is_written(live, spec, probe, refused):
    async def body(hv):
        machine = await hv.create(spec(disks=[
            {"name": "data", "size": "1M"}, {"name": "fixed", "size": "1M", "readonly": True},
        ]))  # fmt: skip
        await machine.start()
        ask = await probe.of(machine)
        await ask("write_memory", offset=4094, data="a1b2c3d4")
        assert await ask("read_memory", offset=4093, length=6) == "00a1b2c3d400"
        await ask("write_disk", disk="data", offset=1, data="ff")
        assert await ask("read_disk", disk="data", offset=0, length=3) == "00ff00"
        await ask("flush", disk="data")
        for request in (
            {"do": "read_memory", "offset": 64 << 20, "length": 1},
            {"do": "read_memory", "offset": -1, "length": 1},
            {"do": "read_memory", "offset": 0, "length": 1 << 30},
            {"do": "read_memory", "offset": True, "length": 1},
            {"do": "read_memory"},
            {"do": "write_memory", "offset": 0, "data": "xyz"},
            {"do": "write_disk", "disk": "none", "offset": 0, "data": "00"},
            {"do": "write_disk", "disk": "fixed", "offset": 0, "data": "00"},
            {"do": "send", "nic": "none", "data": "00"},
            {"do": "no such thing"},
        ):
            with pytest.raises(refused) as caught:
                await ask(request.pop("do"), **request)
            assert str(caught.value)

    live(body)


def test_what_is_no_request_is_answered_with_an_error(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        await ask.channel.write(b"not json\n[1]\n\n")
        assert (await ask.answer())["error"]
        assert "object" in (await ask.answer())["error"]
        # A request may come in parts.
        await ask.channel.write(b'{"id": 1, "do": "vc')
        await ask.channel.write(b'pus"}\n')
        assert await ask.answer() == {"id": 1, "result": 2}

    live(body)


def test_ticks_stand_still_while_it_is_paused_and_requests_wait(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        before = await ask("ticks")
        await asyncio.sleep(10)
        running = await ask("ticks")
        assert running - before == pytest.approx(10_000, abs=2)
        await machine.pause()
        await ask.send("ticks")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await ask.answer()
        await machine.resume()
        assert (await ask.answer())["result"] - running < 100

    live(body)


def test_the_clock_is_the_hypervisors_and_a_deterministic_guests_is_its_own(live, spec, probe):
    async def body(hv):
        plain, own = await hv.create(spec("a")), await hv.create(spec("b", deterministic=True))
        await asyncio.sleep(100)
        for machine in (plain, own):
            await machine.start()
        assert await (await probe.of(plain))("clock") == pytest.approx(hv.now(), abs=1e-3)
        ask = await probe.of(own)
        ticks = await ask("ticks")
        assert await ask("clock") == pytest.approx(VIRTUAL_EPOCH + ticks / 1000, abs=0.01)

    live(body)


def test_entropy_never_repeats_and_comes_from_the_seed(live, spec, probe):
    drawn: list[list[str]] = []

    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        await machine.snapshot("s")
        values = [await ask("entropy"), await ask("entropy")]
        await machine.restore("s")
        values.append(await ask("entropy"))
        fork = await machine.fork("fork")
        values += [await ask("entropy"), await (await probe.of(fork))("entropy")]
        drawn.append(values)

    live(body, seed=5)
    live(body, seed=5)
    live(body, seed=6)
    assert all(len(set(values)) == 5 and len(values[0]) == 32 for values in drawn)
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_the_console_shows_the_boot_echoes_and_keeps_everything(live, spec, probe):
    async def body(hv):
        machine = await hv.create(
            spec(
                boot={"cmdline": "quiet splash"},
                consoles=[{"name": "serial"}, {"name": "second", "kind": "virtio"}],
            )
        )
        console, second = await machine.console(), await machine.console("second")
        with pytest.raises(ChannelClosed):
            await console.write(b"anybody?")
        await machine.start()
        boot = await console.read()
        assert b"Linux version" in boot and b"quiet splash" in boot and b"vm login:" in boot
        ask = await probe.of(machine)
        await console.write(b"root\n")
        assert await console.read() == b"root\n"
        await second.write(b"two")
        assert await second.read() == b"two"
        assert await ask("typed") == "root\ntwo"
        await ask("print", text="hello\n")
        assert await console.read(3) == b"hel"
        assert await console.read() == b"lo\n"
        await machine.restart()
        assert (await console.log()).count(b"Linux version") == 2
        assert await second.log() == b"two"
        await console.close()
        await console.close()
        assert await console.read() == b""
        await machine.delete(force=True)
        assert await second.read() == b""

    live(body)


def test_a_machine_without_consoles_boots(live, spec):
    async def body(hv):
        machine = await hv.create(spec(consoles=[]))
        await machine.start()
        with pytest.raises(ResourceNotFound, match="no console"):
            await machine.console()

    live(body)


def test_the_guest_powers_off_by_itself(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        assert await ask("poweroff") is True
        assert await ask.channel.read() == b""
        assert machine.state is MachineState.STOPPED
        with pytest.raises(ChannelClosed):
            await ask.channel.write(b"\n")
        types = [event.type.value for event in await hv.events()]
        assert "guest-shutdown" in types

    live(body)


def test_a_panic_ends_it_with_the_console_as_evidence(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        await ask.send("panic", message="out of luck")
        assert await ask.channel.read() == b""
        assert machine.state is MachineState.FAILED
        assert "out of luck" in (await machine.status()).reason
        log = await (await machine.console()).log()
        assert b"Kernel panic - not syncing: out of luck" in log
        await machine.start()
        assert machine.state is MachineState.RUNNING

    live(body)


def test_a_guest_that_ignores_the_power_button_is_killed_or_left_alone(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        await ask("ignore_powerdown", on=True)
        with pytest.raises(TimeoutError):
            await machine.stop(kill=False, timeout=5)
        assert machine.state is MachineState.RUNNING
        # Giving up means that it is not turned off by the old request later.
        await ask("ignore_powerdown", on=False)
        await machine.pause()
        await machine.resume()
        assert machine.state is MachineState.RUNNING
        await ask("ignore_powerdown", on=True)
        await machine.stop(timeout=5)
        assert machine.state is MachineState.STOPPED

    live(body)


def test_channels_that_no_program_listens_on_take_everything_and_say_nothing(live, spec):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        channel = await machine.channel("vmlab.agent")
        await channel.write(b"hello")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await channel.read()
        await machine.kill()
        assert await channel.read() == b""
        await channel.close()
        await channel.close()
        await machine.start()
        with pytest.raises(ResourceNotFound) as caught:
            await machine.channel("other")
        assert "vmlab.probe" in str(caught.value.hint)

    live(body)


def test_each_connection_gets_its_own_answers(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        one, two = await probe.of(machine), await probe.of(machine)
        await one.send("vcpus")
        await two.send("hostname")
        assert (await two.answer())["result"] == "vm"
        assert (await one.answer())["result"] == 2
        readers = [asyncio.ensure_future(two.channel.read()) for _ in range(2)]
        await asyncio.sleep(0)
        readers[0].cancel()
        await two.send("vcpus")
        assert json.loads(await readers[1])["result"] == 2

    live(body)


def test_shares_are_copied_into_the_guest_at_start(live, spec, probe, refused, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "sub" / "b.txt").write_text("B")

    async def body(hv):
        machine = await hv.create(
            spec(shares=[{"tag": "src", "source": str(tmp_path), "target": "/src"}])
        )
        await machine.start()
        ask = await probe.of(machine)
        assert await ask("files") == ["/src/a.txt", "/src/sub/b.txt"]
        assert bytes.fromhex(await ask("read_file", path="/src/sub/b.txt")) == b"B"
        with pytest.raises(refused):
            await ask("read_file", path="/etc/passwd")
        await machine.stop()
        (tmp_path / "a.txt").unlink()
        await machine.start()
        assert await (await probe.of(machine))("files") == ["/src/sub/b.txt"]

    live(body)


def test_a_paused_guest_hears_the_power_button_when_it_runs_again(live, spec):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        await machine.pause()
        hardware = hv.world.machines[machine.id]
        hardware.ask_power_down()
        waiting = [asyncio.ensure_future(hardware.until_off()) for _ in range(2)]
        await asyncio.sleep(1)
        assert hardware.has_power and not any(task.done() for task in waiting)
        waiting[0].cancel()
        hardware.resume()
        await waiting[1]
        assert not hardware.has_power
        assert (await machine.status()).state is MachineState.STOPPED

    live(body)
