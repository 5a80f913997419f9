"""A real QEMU with a real kernel, booted once: tests take machines out of its snapshot."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.store import IMAGE_STORE

from vmlab.hypervisors.accelerators import QEMU_BINARIES
from vmlab.hypervisors.base import Snapshot
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import QemuHypervisor, provider
from vmlab.images import Image, ImageStore
from vmlab.machine.architecture import Architecture
from vmlab.machine.spec import MachineSpec

T = TypeVar("T")

IMAGES = {
    Architecture.X86_64: "debian-12-amd64-tiny",
    Architecture.RISCV64: "debian-13-riscv64-tiny",
    Architecture.AARCH64: "debian-13-arm64-tiny",
    Architecture.PPC64LE: "debian-13-ppc64el-tiny",
}


def image_spec(image: Image, name: str, **fields: Any) -> MachineSpec:
    """A machine that boots `image`."""
    boot = {"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline}
    base: dict[str, Any] = {
        "name": name,
        "architecture": image.architecture,
        "memory": "192M",
        "boot": boot,
        "channels": ("test.echo",),
    }
    return MachineSpec.of(**(base | fields))


def bare_spec(name: str = "bare", **fields: Any) -> MachineSpec:
    """A machine that boots nothing: its firmware finds no disk, and waits."""
    base: dict[str, Any] = {"name": name, "architecture": "x86_64", "memory": "32M", "channels": ()}
    return MachineSpec.of(**(base | fields))


class Bench:
    """A run with QEMU in it, and an event loop that its calls run on."""

    def __init__(self, home: Home, **options: str) -> None:
        self.runner = asyncio.Runner()
        self.lease = Run.begin(home, reap=False)
        self.qemu: QemuHypervisor = provider.open(self.lease.owner, options)

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 290) -> T:
        return self.runner.run(asyncio.wait_for(work, timeout))

    def close(self) -> None:
        try:
            self.run(self.qemu.close())
        finally:
            self.runner.close()
            left = self.lease.close()
        assert left == []


class Shell:
    """The shell on a machine's console."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine

    async def run(self, command: str, timeout: float = 150) -> str:
        """Run a command; what it printed. Its status has to be 0."""
        tag = secrets.token_hex(4)
        begin, end = f"<{tag}".encode(), f"{tag}>".encode()
        # The marks are not in the line itself, which the shell echoes.
        line = f"echo '<''{tag}'; ( {command} ) 2>&1; echo '{tag}''>' $?\n"
        out = b""
        try:
            async with asyncio.timeout(timeout), await self.machine.console() as console:
                await console.write(line.encode())
                while end not in out or b"\n" not in out.split(end, 1)[1]:
                    out += await console.read()
        except TimeoutError:
            pytest.fail(f"{command}: no answer within {timeout:g} s, but {out!r}")
        text = out.replace(b"\r", b"").split(begin + b"\n", 1)[1].decode(errors="replace")
        answer, _, status = text.partition(end.decode())
        assert status.split()[0] == "0", f"{command}: {answer} {status}"
        return answer


async def until_booted(machine: Any, timeout: float = 280) -> Shell:
    """Wait for the shell on the console, and begin it."""
    console = await machine.console()
    try:
        async with asyncio.timeout(timeout), console:
            while b"Please press Enter" not in await console.log():
                await console.read()
            await console.write(b"\n")
            seen = b""
            while b"# " not in seen:
                seen += await console.read()
    except TimeoutError:
        pytest.fail(f"not booted within {timeout:g} s: ...{(await console.log())[-2000:]!r}")
    return Shell(machine)


@pytest.fixture(scope="session")
def images() -> Callable[[Architecture], Image]:
    """The tiny image of an architecture."""

    def find(architecture: Architecture) -> Image:
        if shutil.which(QEMU_BINARIES[architecture]) is None:
            pytest.fail(f"{QEMU_BINARIES[architecture]} is not installed: see tools/")
        return ImageStore(IMAGE_STORE).ensure(IMAGES[architecture])

    return find


@pytest.fixture(scope="session")
def home() -> Iterator[Home]:
    """A home of the tests' own."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-q-"))
    yield Home.open(directory)
    shutil.rmtree(directory)


@pytest.fixture
def bench(home: Home) -> Iterator[Bench]:
    """A run of the test's own."""
    made = Bench(home)
    yield made
    made.close()


class Booted:
    """A run with a snapshot of a booted machine; `machine` makes another one out of it."""

    def __init__(self, home: Home, image: Image) -> None:
        self.bench = Bench(home)
        self.qemu = self.bench.qemu
        self.run = self.bench.run
        self.snapshot: Snapshot = self.run(self._boot(image))
        self.numbers = 0

    async def _boot(self, image: Image) -> Snapshot:
        spec = image_spec(
            image,
            "booted",
            cpus=2,
            disks=[{"name": "data", "size": "16M"}, {"name": "slow", "size": "8M", "bus": "scsi"}],
            nics=[
                {"name": "lan", "network": "segment:lan"},
                {"name": "wan", "forwards": [{"guest": 7}]},
            ],
        )
        machine = await self.qemu.create(spec)
        await machine.start()
        await until_booted(machine)
        snapshot = await machine.snapshot("booted")
        await machine.kill()
        return snapshot

    async def machine(self) -> tuple[Any, Shell]:
        """A machine that has just booted."""
        self.numbers += 1
        machine = await self.qemu.create_from(self.snapshot, f"vm{self.numbers}")
        return machine, Shell(machine)


@pytest.fixture(scope="session")
def session_booted(home: Home, images: Callable[[Architecture], Image]) -> Iterator[Booted]:
    booted = Booted(home, images(Architecture.X86_64))
    yield booted
    booted.bench.close()


@pytest.fixture
def booted(session_booted: Booted) -> Iterator[Booted]:
    """The booted machine's run; machines of the test are deleted afterwards."""
    yield session_booted

    async def clear() -> None:
        for machine in await session_booted.qemu.list():
            if machine.name != "booted":
                await machine.delete(force=True)

    session_booted.run(clear())


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., MachineSpec]:
    """`bare_spec`."""
    return bare_spec


@pytest.fixture(scope="session")
def make_image_spec() -> Callable[..., MachineSpec]:
    """`image_spec`."""
    return image_spec


@pytest.fixture(scope="session")
def shell_of() -> Callable[..., Coroutine[Any, Any, Shell]]:
    """`until_booted`."""
    return until_booted


@pytest.fixture
def new_bench(home: Home) -> Iterator[Callable[..., Bench]]:
    """`Bench`, in another home if one is given; what the test leaves open is ended after it."""
    made: list[Bench] = []

    def make(where: Home | None = None, **options: str) -> Bench:
        made.append(Bench(where or home, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.runner.close()
        bench.lease.close()


@pytest.fixture
def profile_of(images: Callable[[Architecture], Image], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The conformance suite's profile of an architecture, with the image that is there."""
    from vmlab.conformance.qemu_profile import make_profile

    def make(architecture: Architecture) -> Any:
        image = images(architecture)
        monkeypatch.setenv("VMLAB_IMAGE_STORE", str(image.directory.parent.parent))
        return make_profile(architecture)

    return make


@pytest.fixture
def subject_of(profile_of: Any) -> Any:
    """QEMU as the conformance suite has it, for guests of an architecture."""
    from vmlab.conformance.runner import Subject

    return lambda architecture: Subject(provider, profile_of(architecture))
