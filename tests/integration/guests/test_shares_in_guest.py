"""Shares in a real guest: by virtiofs, by 9p or copied, read-only and writable."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.guests.conftest import IMAGES, PATIENCE
from tests.integration.ordinary_user import NOBODY, as_nobody
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.guests.shares import mount_shares, unmount_shares
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import QemuHypervisor, provider, virtiofs
from vmlab.images import ImageStore
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import MachineSpec, Share, ShareKind

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

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


WAYS = [ShareKind.P9, *([ShareKind.VIRTIOFS] if virtiofs.why_not() is None else [])]
"""The ways that this host has."""


@pytest.fixture(scope="module")
def shares(source: Path) -> tuple[Share, ...]:
    """One that finds its own way; and each way, one that is read-only and one that is writable."""
    return (
        Share(tag="own", target="/mnt/own", source=source),
        *(
            Share(
                tag=f"{way.value}-{'rw' if writable else 'ro'}",
                source=source,
                target=f"/mnt/{way.value} {'work' if writable else 'fixed'}",
                readonly=not writable,
                kind=way,
            )
            for way in WAYS
            for writable in (False, True)
        ),
    )


@pytest.fixture(params=WAYS, ids=lambda way: way.value)
def fixed(request: pytest.FixtureRequest, shares: tuple[Share, ...]) -> Share:
    """A read-only share."""
    return next(share for share in shares if share.tag == f"{request.param.value}-ro")


@pytest.fixture(params=WAYS, ids=lambda way: way.value)
def work(request: pytest.FixtureRequest, shares: tuple[Share, ...]) -> Share:
    """A writable share."""
    return next(share for share in shares if share.tag == f"{request.param.value}-rw")


def spec_with(*shares: Share) -> MachineSpec:
    """A machine with those shares."""
    need("qemu-system-x86_64")
    image = ImageStore(IMAGE_STORE).ensure(IMAGES[Architecture.X86_64])
    return MachineSpec.of(
        name="shares",
        architecture=Architecture.X86_64,
        memory="256M",
        boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
        channels=CHANNELS,
        shares=shares,
    )


async def booted(hypervisor: QemuHypervisor, *shares: Share) -> Guest:
    """The guest of a machine with those shares, not mounted yet."""
    machine = await hypervisor.create(spec_with(*shares))
    await machine.start()
    guest = Guest(machine, AgentChannel(machine.channel))
    await guest.connect(timeout=PATIENCE)
    return guest


@pytest.fixture(scope="module")
def do(shares: tuple[Share, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Do]:
    """Runs a coroutine function with a guest whose machine has the shares."""
    with Run.begin(Home.open(tmp_path_factory.mktemp("home"))) as run, asyncio.Runner() as runner:
        hypervisor = provider.open(run.owner)
        guest = runner.run(booted(hypervisor, *shares))
        yield lambda body: runner.run(asyncio.wait_for(body(guest), PATIENCE))
        runner.run(guest.close())
        runner.run(hypervisor.close())


def test_a_read_only_share_is_seen_with_every_byte_and_cannot_be_written(
    do: Do, fixed: Share, source: Path
) -> None:
    async def body(guest: Guest) -> None:
        assert await mount_shares(guest, [fixed]) == {fixed.tag: fixed.kind}
        assert await guest.read(f"{fixed.target}/deep/bytes") == ANY_BYTES
        assert (await guest.succeed(f"'{fixed.target}'/link")).stdout == "ran\n"
        refused = await guest.fail(f"echo no >'{fixed.target}/script'")
        assert "Read-only file system" in refused.stderr
        # It is the host that refuses: the guest's root may mount it as it likes.
        again = await guest.execute(
            f"mount -o remount,rw '{fixed.target}'; cd '{fixed.target}'; "
            "echo no >script; echo no >new; rm script; chmod 777 script; touch deep"
        )
        assert not again.ok
        assert (source / "script").read_text() == "#!/bin/sh\necho ran\n"
        assert (source / "script").stat().st_mode & 0o777 == 0o755
        assert not (source / "new").exists()
        # What the host writes later is there as well: it is the directory and not a copy.
        (source / "later").write_text("later")
        await guest.wait_for_file(f"{fixed.target}/later", timeout=PATIENCE)
        assert await guest.read(f"{fixed.target}/later") == b"later"
        (source / "later").unlink()
        await unmount_shares(guest, [fixed])
        await unmount_shares(guest, [fixed])
        assert not (await guest.execute(f"ls '{fixed.target}'/*")).ok

    do(body)


def test_what_the_guest_writes_to_a_writable_share_is_on_the_host(
    do: Do, work: Share, source: Path
) -> None:
    async def body(guest: Guest) -> None:
        assert await mount_shares(guest, [work]) == {work.tag: work.kind}
        data = os.urandom(3 << 20)
        await guest.write(f"{work.target}/new/file", data)
        assert (source / "new" / "file").read_bytes() == data
        await guest.succeed(f"cd '{work.target}'; mv new/file moved; rm -r new; sync")
        assert (source / "moved").read_bytes() == data
        assert not (source / "new").exists()
        (source / "moved").unlink()
        # A share that is in use is not torn away.
        await guest.succeed(f"cd '{work.target}'; sleep 1000 >/dev/null 2>&1 & echo $! >/tmp/held")
        with pytest.raises(OperationFailed, match=f"cannot unmount share '{work.tag}'"):
            await unmount_shares(guest, [work])
        await guest.succeed("kill $(cat /tmp/held)")
        await guest.wait_until_succeeds(f"umount '{work.target}'", timeout=PATIENCE)

    do(body)


MADE = """
cd '{place}' && mkdir made && cd made && umask 022
echo '#!/bin/sh' >tool; echo 'echo built' >>tool; chmod 751 tool
echo text >plain; chmod 640 plain
ln -s tool link; ln -s /nowhere dangling; ln plain hard
mkdir -m 2750 folder; mkfifo fifo 2>/dev/null
dd if=/dev/zero of=sparse bs=1 count=1 seek=1M 2>/dev/null
touch -d @1000000000 old
"""


def test_what_is_built_in_a_share_is_ordinary_files_of_the_host(
    do: Do, work: Share, source: Path
) -> None:
    made = source / "made"

    async def body(guest: Guest) -> None:
        await mount_shares(guest, [work])
        await guest.succeed(MADE.format(place=work.target))
        modes = {path.name: path.lstat().st_mode & 0o7777 for path in made.iterdir()}
        assert (modes["tool"], modes["plain"], modes["folder"]) == (0o751, 0o640, 0o2750)
        assert str((made / "link").readlink()) == "tool"
        assert str((made / "dangling").readlink()) == "/nowhere"
        assert (made / "plain").stat().st_nlink == 2
        assert (made / "old").stat().st_mtime == 1_000_000_000
        assert (made / "sparse").stat().st_size == (1 << 20) + 1
        done = await asyncio.create_subprocess_exec(made / "link", stdout=asyncio.subprocess.PIPE)
        assert (await done.communicate())[0] == b"built\n"
        for path in (made, *made.iterdir()):
            status = path.lstat()
            assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid()), path
            assert os.listxattr(path, follow_symlinks=False) == [], path
        # And the other way.
        (made / "host").write_text("#!/bin/sh\necho hosted\n")
        (made / "host").chmod(0o700)
        (made / "back").symlink_to("host")
        assert (await guest.succeed(f"'{work.target}/made/back'")).stdout == "hosted\n"
        (made / "host").chmod(0o644)
        await guest.wait_until_succeeds(
            f"test $(stat -c %a '{work.target}/made/host') = 644", timeout=PATIENCE
        )
        if os.geteuid() == 0:
            os.chown(made / "host", 1234, 2345)
            await guest.wait_until_succeeds(
                f"test $(stat -c %u:%g '{work.target}/made/host') = 1234:2345", timeout=PATIENCE
            )
            await guest.succeed(f"chown 77:88 '{work.target}/made/plain'")
            status = (made / "plain").stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (77, 88, 0o640)
        await guest.succeed(f"rm -r '{work.target}/made'")
        assert not made.exists()
        await unmount_shares(guest, [work])

    do(body)


def test_one_that_finds_its_own_way_is_mounted_where_that_works_and_copied_elsewhere(
    do: Do, shares: tuple[Share, ...], source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(guest: Guest) -> None:
        own = shares[0]
        with caplog.at_level(logging.INFO):
            for way in reversed(WAYS):
                assert await mount_shares(guest, [own]) == {"own": way}
                assert await guest.read(f"{own.target}/deep/bytes") == ANY_BYTES
                await unmount_shares(guest, [own])
                # From here on the guest's kernel does not have it.
                await guest.succeed(
                    f"rmmod {way.value} && "
                    f"find /lib/modules/ -name '{way.value}.ko*' -exec rm '{{}}' +"
                )
            if len(WAYS) == 2:
                assert "share own is mounted by 9p: virtiofs: " in caplog.text
            assert await mount_shares(guest, [own]) == {"own": ShareKind.COPY}
        assert "share own is copied: virtiofs: " in caplog.text
        assert await guest.read(f"{own.target}/deep/bytes") == ANY_BYTES
        assert (await guest.succeed(f"{own.target}/link")).stdout == "ran\n"
        assert "Read-only" in (await guest.fail(f"echo no >{own.target}/script")).stderr
        writable = own.model_copy(update={"readonly": False, "target": "/mnt/other"})
        with pytest.raises(OperationFailed, match="cannot mount share 'own' at /mnt/other") as no:
            await mount_shares(guest, [writable])
        assert "would be lost" in str(no.value.hint)
        with pytest.raises(OperationFailed, match="'9p-ro' at /mnt/9p fixed: 9p: mount"):
            await mount_shares(guest, [share for share in shares if share.tag == "9p-ro"])

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


def test_shares_can_be_mounted_again_when_the_machine_was_reset(
    shares: tuple[Share, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Run.begin(Home.open(tmp_path_factory.mktemp("home"))) as run, asyncio.Runner() as runner:
        hypervisor = provider.open(run.owner)

        async def body() -> None:
            guest = await booted(hypervisor, *shares)
            for resets in (False, True):
                if resets:
                    await guest.machine.restart(graceful=False)
                    await guest.connect(timeout=PATIENCE)
                ways = await mount_shares(guest, shares)
                assert ways == {"own": WAYS[-1]} | {one.tag: one.kind for one in shares[1:]}
                for share in shares:
                    assert await guest.read(f"{share.target}/deep/bytes") == ANY_BYTES
            await guest.close()

        runner.run(asyncio.wait_for(body(), PATIENCE))
        runner.run(hypervisor.close())


def test_a_machine_is_forked_when_its_9p_shares_are_unmounted(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    share = Share(tag="src", source=source, target="/src", kind=ShareKind.P9)
    with Run.begin(Home.open(tmp_path_factory.mktemp("home"))) as run, asyncio.Runner() as runner:
        hypervisor = provider.open(run.owner)

        async def body() -> None:
            guest = await booted(hypervisor, share)
            await mount_shares(guest, [share])
            for refused in (guest.machine.fork("no"), guest.machine.snapshot("no")):
                with pytest.raises(OperationFailed, match="'src'") as why:
                    await refused
                assert "unmount the shares in the guest first" in str(why.value.hint)
            await guest.machine.snapshot("disks", memory=False)
            await unmount_shares(guest, [share])
            fork = await guest.machine.fork("fork")
            other = Guest(fork, AgentChannel(fork.channel))
            await other.connect(timeout=PATIENCE)
            assert await mount_shares(other, [share]) == {"src": ShareKind.P9}
            assert await other.read("/src/deep/bytes") == ANY_BYTES
            await other.close()
            await guest.close()

        runner.run(asyncio.wait_for(body(), PATIENCE))
        runner.run(hypervisor.close())


AS_ORDINARY_USER = """
    import asyncio, os, sys
    from pathlib import Path
    from vmlab.guests.agent import CHANNELS, AgentChannel
    from vmlab.guests.guest import Guest
    from vmlab.guests.shares import mount_shares
    from vmlab.hypervisors.ownership import Home, Run
    from vmlab.hypervisors.qemu import provider
    from vmlab.machine.spec import MachineSpec, Share

    async def main():
        place, cmdline, made = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
        share = Share(tag="work", source=place / "shared", target="/shared", readonly=False)
        with Run.begin(Home.open(place / "home")) as run:
            async with provider.open(run.owner) as qemu:
                print((await qemu.capabilities()).unsupported.get("share-virtiofs"))
                machine = await qemu.create(MachineSpec.of(
                    name="m", architecture="x86_64", memory="256M", channels=CHANNELS,
                    boot={"kernel": place / "kernel", "initrd": place / "initrd",
                          "cmdline": cmdline}, shares=[share]))
                await machine.start()
                guest = Guest(machine, AgentChannel(machine.channel))
                await guest.connect(timeout=900)
                print((await mount_shares(guest, [share]))["work"].value)
                await guest.succeed(made)
                print((await guest.succeed("/shared/host; stat -c %u /shared/host")).stdout)
                refused = await guest.execute("chown 77 /shared/host; mknod /shared/n c 1 3")
                print(refused.status)
                await guest.close()

    asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_what_an_ordinary_users_guest_writes_is_that_users(tmp_path: Path) -> None:
    image = ImageStore(IMAGE_STORE).ensure(IMAGES[Architecture.X86_64])
    with tempfile.TemporaryDirectory(prefix="vmlab-u-") as directory:
        place = Path(directory)
        shutil.copy(image.kernel, place / "kernel")
        shutil.copy(image.initrd, place / "initrd")
        shared = place / "shared"
        shared.mkdir()
        (shared / "host").write_text("#!/bin/sh\necho hosted\n")
        (shared / "host").chmod(0o750)
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        script = textwrap.dedent(AS_ORDINARY_USER)
        made = MADE.format(place="/shared")
        done = subprocess.run(
            as_nobody(place, sys.executable, "-c", script, place, image.cmdline, made),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        why, way, *seen = done.stdout.split("\n")
        assert why == "virtiofsd has to be started by root"
        assert way == "9p"
        # A device node is not for an ordinary user to make.
        assert list(filter(None, seen)) == ["hosted", str(NOBODY), "1"]
        modes = {path.name: path.lstat().st_mode & 0o7777 for path in (shared / "made").iterdir()}
        assert (modes["tool"], modes["plain"], modes["folder"]) == (0o751, 0o640, 0o2750)
        assert str((shared / "made" / "link").readlink()) == "tool"
        for path in (shared / "made", *(shared / "made").iterdir(), shared / "host"):
            status = path.lstat()
            assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY), path
            assert os.listxattr(path, follow_symlinks=False) == [], path
