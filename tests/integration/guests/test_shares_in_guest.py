"""Shares in a real guest: mounted by 9p or copied, read-only and writable."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.guests.conftest import _IMAGE_STORE, IMAGES

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.guests.shares import mount_shares
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import provider
from vmlab.images import ImageStore
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import MachineSpec, Share, ShareKind

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]

ANY_BYTES = bytes(range(256)) * 5000

Do = Callable[[Callable[[Guest], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the host's."""
    directory = tmp_path_factory.mktemp("shared")
    (directory / "deep").mkdir()
    (directory / "deep" / "bytes").write_bytes(ANY_BYTES)
    (directory / "script").write_text("#!/bin/sh\necho ran\n")
    (directory / "script").chmod(0o755)
    (directory / "link").symlink_to("script")
    return directory


@pytest.fixture(scope="module")
def shares(source: Path) -> tuple[Share, Share, Share]:
    """Read-only, writable, and one that finds its own way."""
    common = {"source": source, "kind": ShareKind.P9}
    return (
        Share(tag="fixed", target="/mnt/fixed", **common),
        Share(tag="work", target="/mnt/with space", readonly=False, **common),
        Share(tag="own", target="/mnt/own", source=source),
    )


@pytest.fixture(scope="module")
def do(shares: tuple[Share, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Do]:
    """Runs a coroutine function with a guest whose machine has the shares."""
    assert shutil.which("qemu-system-x86_64"), "tools/debian-packages.txt lists it"
    image = ImageStore(_IMAGE_STORE).ensure(IMAGES[Architecture.X86_64])
    spec = MachineSpec.of(
        name="shares",
        architecture=Architecture.X86_64,
        memory="256M",
        boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
        channels=CHANNELS,
        shares=shares,
    )
    with Run.begin(Home.open(tmp_path_factory.mktemp("home"))) as run, asyncio.Runner() as runner:
        hypervisor = provider.open(run.owner)

        async def boot() -> Guest:
            machine = await hypervisor.create(spec)
            await machine.start()
            guest = Guest(machine, AgentChannel(machine.channel))
            await guest.connect(timeout=300)
            return guest

        guest = runner.run(boot())
        yield lambda body: runner.run(asyncio.wait_for(body(guest), 500))
        runner.run(guest.close())
        runner.run(hypervisor.close())


def test_a_read_only_share_is_seen_with_every_byte_and_cannot_be_written(
    do: Do, shares: tuple[Share, ...], source: Path
) -> None:
    async def body(guest: Guest) -> None:
        fixed = shares[0]
        assert await mount_shares(guest, [fixed]) == {"fixed": ShareKind.P9}
        assert await guest.read(f"{fixed.target}/deep/bytes") == ANY_BYTES
        assert (await guest.succeed(f"{fixed.target}/link")).stdout == "ran\n"
        refused = await guest.fail(f"echo no >{fixed.target}/script")
        assert "Read-only file system" in refused.stderr
        # What the host writes later is there as well: it is the directory and not a copy.
        (source / "later").write_text("later")
        await guest.wait_for_file(f"{fixed.target}/later", timeout=300)
        assert await guest.read(f"{fixed.target}/later") == b"later"
        (source / "later").unlink()

    do(body)


def test_what_the_guest_writes_to_a_writable_share_is_on_the_host(
    do: Do, shares: tuple[Share, ...], source: Path
) -> None:
    async def body(guest: Guest) -> None:
        work = shares[1]
        assert await mount_shares(guest, [work]) == {"work": ShareKind.P9}
        data = os.urandom(3 << 20)
        await guest.write(f"{work.target}/new/file", data)
        assert (source / "new" / "file").read_bytes() == data
        await guest.succeed(f"cd '{work.target}'; mv new/file moved; rm -r new; sync")
        assert (source / "moved").read_bytes() == data
        assert not (source / "new").exists()
        (source / "moved").unlink()

    do(body)


def test_one_that_finds_its_own_way_is_mounted_where_that_works_and_copied_elsewhere(
    do: Do, shares: tuple[Share, ...], source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(guest: Guest) -> None:
        own = shares[2]
        assert await mount_shares(guest, [own]) == {"own": ShareKind.P9}
        assert await guest.read(f"{own.target}/deep/bytes") == ANY_BYTES
        # From here on the guest's kernel has no 9p.
        await guest.succeed(
            "for t in $(awk '$3 == \"9p\" { print $2 }' /proc/mounts); do "
            'umount "$(printf %b "$t")" || exit; done',
            "rmmod 9p && find /lib/modules/ -name '9p.ko*' -exec rm '{}' +",
        )
        with caplog.at_level(logging.WARNING):
            assert await mount_shares(guest, [own]) == {"own": ShareKind.COPY}
        assert "share own is copied: 9p: " in caplog.text
        assert await guest.read(f"{own.target}/deep/bytes") == ANY_BYTES
        assert (await guest.succeed(f"{own.target}/link")).stdout == "ran\n"
        assert "Read-only" in (await guest.fail(f"echo no >{own.target}/script")).stderr
        with pytest.raises(OperationFailed, match="cannot mount share 'work'"):
            await mount_shares(guest, [shares[1].model_copy(update={"kind": ShareKind.AUTO})])

    do(body)


def test_a_copy_that_is_writable_is_the_guests_own(do: Do, source: Path) -> None:
    async def body(guest: Guest) -> None:
        share = Share(
            tag="copy", source=source, target="/srv/copy", readonly=False, kind=ShareKind.COPY
        )
        assert await mount_shares(guest, [share]) == {"copy": ShareKind.COPY}
        await guest.succeed("echo changed >/srv/copy/script")
        assert await guest.read("/srv/copy/script") == b"changed\n"
        assert (source / "script").read_text() == "#!/bin/sh\necho ran\n"
        # What is in its place already is not written over.
        with pytest.raises(CommandFailed, match="not empty"):
            await mount_shares(guest, [share])

    do(body)


def test_a_way_that_the_machine_has_not_is_refused_by_name(do: Do, source: Path) -> None:
    async def body(guest: Guest) -> None:
        share = Share(tag="no", source=source, target="/mnt/no", kind=ShareKind.VIRTIOFS)
        with pytest.raises(OperationFailed, match="cannot mount share 'no' at /mnt/no: virtiofs"):
            await mount_shares(guest, [share])

    do(body)
