"""The display of a real QEMU: what firmware and a guest show, and keys that reach them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vmlab.conformance.checks.display import pixels_of
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidState, OperationFailed, UnsupportedOperation


async def until_changed(machine: Any, before: bytes) -> bytes:
    """The first picture that is another one."""
    async with asyncio.timeout(150):
        while (image := await machine.screenshot()) == before:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.05)
    return image


@pytest.mark.parametrize("architecture", ["x86_64", "riscv64", "aarch64", "ppc64le"])
def test_display_of_each_architecture_can_be_looked_at(
    bench: Any, make_spec: Any, architecture: str
) -> None:
    async def test() -> None:
        spec = make_spec(architecture=architecture, memory="256M", display=True)
        machine = await bench.qemu.create(spec)
        with pytest.raises(InvalidState):
            await machine.screenshot()
        await machine.start()
        width, height, _ = pixels_of(await machine.screenshot())
        assert width >= 320
        assert height >= 200
        await machine.send_keys(["a", "ctrl-alt-delete"])
        await machine.pause()
        still = await machine.screenshot()
        assert await machine.screenshot() == still
        with pytest.raises(InvalidState):
            await machine.send_keys(["a"])
        assert not list(machine.directory.rglob("*.ppm"))

    bench.run(test())


def test_machine_without_a_display_shows_nothing(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec())
        await machine.start()
        for call in (machine.screenshot(), machine.send_keys(["a"])):
            with pytest.raises(UnsupportedOperation, match="display"):
                await call

    bench.run(test())


def test_picture_that_cannot_be_written_is_an_error_that_says_so(
    bench: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(display=True))
        await machine.start()
        execute = machine.emulator.execute

        async def elsewhere(command: str, arguments: Any = None, **options: Any) -> Any:
            # What a full disk leaves behind: a file without a picture in it.
            if command == "screendump":
                await asyncio.to_thread(Path(arguments["filename"]).touch)
                return None
            return await execute(command, arguments, **options)

        monkeypatch.setattr(machine.emulator, "execute", elsewhere)
        with pytest.raises(OperationFailed, match="QEMU wrote no picture"):
            await machine.screenshot()
        assert not list(machine.directory.rglob("*.ppm"))
        monkeypatch.undo()

    bench.run(test())


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_guest_shows_is_seen_and_keys_reach_its_terminal(
    bench: Any, images: Any, make_image_spec: Any, shell_of: Any
) -> None:
    async def test() -> None:
        image = images(Architecture.X86_64)
        machine = await bench.qemu.create(make_image_spec(image, "shown", display=True))
        await machine.start()
        shell = await shell_of(machine)
        blank = await machine.screenshot()
        await shell.run("echo a sign of life > /dev/tty1")
        shown = await until_changed(machine, blank)
        # What is typed while nobody has the terminal open is dropped.
        await shell.run(
            "(exec < /dev/tty1; touch /tmp/open; head -n 1 > /tmp/typed; touch /tmp/done) & "
            "until [ -e /tmp/open ]; do usleep 20000; done"
        )
        await machine.send_keys(["h", "e", "shift-l", "l", "o", "ret"])
        await shell.run("until [ -e /tmp/done ]; do usleep 50000; done")
        assert await shell.run("cat /tmp/typed") == "heLlo\n"
        assert await machine.screenshot() != shown
        # A copy of the machine shows what it showed.
        fork = await machine.fork("fork")
        assert pixels_of(await fork.screenshot())[:2] == pixels_of(shown)[:2]

    bench.run(test(), 800)
