"""A Debian archive of a few kilobytes, made and signed by the test, and served on 127.0.0.1."""

from __future__ import annotations

import email.utils
import functools
import gzip
import hashlib
import http.server
import io
import lzma
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pysequoia
import pytest

from vmlab.images.debian.apt import AptConfiguration
from vmlab.images.settings import ImageSettings
from vmlab.images.store.store import ImageStore

KERNEL_RELEASE = "6.99-test"
RECIPE = """
name = "small-tiny"
suite = "trixie"
architecture = "riscv64"
kernel = "linux-image-riscv64"
packages = ["busybox-static"]
[modules]
load = ["virtio_console"]
late = ["virtio_net", "absent?"]
available = ["builtin_thing"]
"""


@pytest.fixture(autouse=True)
def no_settings_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests read neither the user's store, settings nor proxies."""
    for name in (
        "VMLAB_HOME",
        "VMLAB_IMAGE_STORE",
        "VMLAB_IMAGE_STORE_LIMIT",
        "VMLAB_DEBIAN_MIRROR",
        "VMLAB_DEBIAN_KEYRING",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VMLAB_CONFIG", str(tmp_path / "no-config.toml"))


def ar_archive(members: list[tuple[str, bytes]]) -> bytes:
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def tar_archive(entries: list[tuple[str, bytes | str | None, int]]) -> bytes:
    """`entries`: (path, contents; a str is a symlink's target, None a directory, mode)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, data, mode in entries:
            info = tarfile.TarInfo(path)
            info.mode = mode
            if data is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def deb_package(
    control: str, entries: list[tuple[str, bytes | str | None, int]], *, suffix: str = ".xz"
) -> bytes:
    import zstandard

    compress: dict[str, Callable[[bytes], bytes]] = {
        ".xz": lzma.compress,
        ".gz": functools.partial(gzip.compress, mtime=0),
        ".zst": zstandard.ZstdCompressor().compress,
        "": bytes,
    }
    return ar_archive([
        ("debian-binary", b"2.0\n"),
        (f"control.tar{suffix}", compress[suffix](tar_archive(
            [("./", None, 0o755), ("./control", control.encode(), 0o644)]))),
        (f"data.tar{suffix}", compress[suffix](tar_archive(entries))),
    ])  # fmt: skip


def kernel_module(name: str, depends: str = "", *more: str) -> bytes:
    """The smallest ELF file with a .modinfo section."""
    modinfo = (
        b"\0".join(item.encode() for item in (f"name={name}", f"depends={depends}", *more)) + b"\0"
    )
    names = b"\0.modinfo\0.shstrtab\0"
    header_bytes = 64
    body = modinfo + names
    sections = header_bytes + len(body)
    elf = struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 1, 243, 1, 0, 0, sections,
                      0, 64, 0, 0, 64, 3, 2)  # fmt: skip

    def section(name_at: int, kind: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name_at, kind, 0, 0, at, size, 0, 0, 1, 0)

    return (elf + body + section(0, 0, 0, 0) + section(1, 1, header_bytes, len(modinfo))
            + section(10, 3, header_bytes + len(modinfo), len(names)))  # fmt: skip


def riscv_kernel(release: str = KERNEL_RELEASE) -> bytes:
    head = bytearray(64)
    head[48:56] = b"RISCV\0\0\0"
    head[56:60] = b"RSC\x05"
    return bytes(head) + f"Linux version {release} (builder) #1\n\0".encode() + bytes(2000)


def busybox_binary() -> bytes:
    names = ["[", "[[", "ash", "busybox", "cat", "echo", "init", "insmod", "ls", "modprobe",
             "mount", "ps", "sh", "sleep"]  # fmt: skip
    table = b"\0".join(name.encode() for name in names) + b"\0\0"
    return b"\x7fELF" + bytes(60) + b"strings\0" + table + b"more\0"


@dataclass
class SmallArchive:
    """A mirror's directory: change `packages`, then `publish` it."""

    root: Path
    key: pysequoia.Tsk
    codename: str = "trixie"
    suite: str = "stable"
    date: float = 1_700_000_000.0
    valid_until: float | None = None
    version: str = "1.0"
    by_hash: bool = True
    packages: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    @property
    def keyring(self) -> bytes:
        return bytes(self.key.extract_certificate())

    def add(
        self,
        name: str,
        entries: list[tuple[str, bytes | str | None, int]],
        *,
        version: str | None = None,
        depends: str = "",
        more: str = "",
        suffix: str = ".xz",
    ) -> None:
        control = f"Package: {name}\nVersion: {version or self.version}\nArchitecture: riscv64\n"
        control += f"Depends: {depends}\n" if depends else ""
        control += more
        self.packages[name] = (control, deb_package(control, entries, suffix=suffix))

    def add_usual(self, *, payload: bytes = b"") -> None:
        base = f"./lib/modules/{KERNEL_RELEASE}"
        self.add("busybox-static", [
            ("./", None, 0o755), ("./bin/", None, 0o755),
            ("./bin/busybox", busybox_binary(), 0o755),
            ("./usr/share/doc/busybox/README", b"left out", 0o644),
        ])  # fmt: skip
        self.add("linux-image-riscv64", [], depends=f"linux-image-{KERNEL_RELEASE} (= 1.0)")
        self.add(f"linux-image-{KERNEL_RELEASE}", [
            (f"./boot/vmlinux-{KERNEL_RELEASE}", riscv_kernel(), 0o644),
            (f"{base}/modules.builtin", b"kernel/lib/builtin-thing.ko\n", 0o644),
            (f"{base}/kernel/drivers/char/virtio_console.ko.xz",
             lzma.compress(kernel_module("virtio_console", "virtio-ring",
                                         "alias=virtio:d00000003v*")), 0o644),
            (f"{base}/kernel/drivers/net/virtio_net.ko",
             kernel_module("virtio_net", "failover", "softdep=pre: crc32c"), 0o644),
            (f"{base}/kernel/drivers/virtio/virtio_ring.ko", kernel_module("virtio_ring"), 0o644),
            (f"{base}/kernel/net/failover.ko", kernel_module("failover"), 0o644),
            (f"{base}/kernel/lib/crc32c.ko", kernel_module("crc32c"), 0o644),
            (f"{base}/kernel/lib/unwanted.ko", kernel_module("unwanted") + payload, 0o644),
        ], depends="kmod, initramfs-tools | linux-initramfs-tool")  # fmt: skip

    def path(self, name: str) -> Path:
        return self.root / "pool" / f"{name}_{self.version}_riscv64.deb"

    def publish(self, *, resign: bool = True) -> None:
        stanzas = []
        for name, (control, data) in sorted(self.packages.items()):
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            stanzas.append(
                f"{control}Filename: pool/{path.name}\nSize: {len(data)}\n"
                f"SHA256: {hashlib.sha256(data).hexdigest()}\nDescription: for a test\n"
            )
        index = lzma.compress("\n".join(stanzas).encode())
        dists = self.root / "dists" / self.codename
        binary = dists / "main" / "binary-riscv64"
        digest = hashlib.sha256(index).hexdigest()
        binary.mkdir(parents=True, exist_ok=True)
        (binary / "Packages.xz").write_bytes(index)
        if self.by_hash:
            (binary / "by-hash" / "SHA256").mkdir(parents=True, exist_ok=True)
            (binary / "by-hash" / "SHA256" / digest).write_bytes(index)
        text = (
            f"Origin: Debian\nSuite: {self.suite}\nVersion: 13.0\nCodename: {self.codename}\n"
            f"Date: {email.utils.formatdate(self.date, usegmt=True).replace('GMT', 'UTC')}\n"
        )
        if self.valid_until is not None:
            stamp = email.utils.formatdate(self.valid_until, usegmt=True).replace("GMT", "UTC")
            text += f"Valid-Until: {stamp}\n"
        text += f"Acquire-By-Hash: {'yes' if self.by_hash else 'no'}\n"
        text += f"SHA256:\n {digest} {len(index)} main/binary-riscv64/Packages.xz\n"
        if resign:
            signed = pysequoia.sign(
                self.key.signer(), text.encode(), mode=pysequoia.SignatureMode.CLEAR
            )
            (dists / "InRelease").write_bytes(bytes(signed))


@dataclass
class Behaviour:
    """How the mirror misbehaves, by the end of a path.

    `cut`: after how many bytes the connection is closed, one number for each request; `replies`:
    HTTP statuses likewise; `silent`: what is never answered; `ranges`: whether it knows them.
    """

    cut: dict[str, list[int]] = field(default_factory=dict)
    replies: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    silent: set[str] = field(default_factory=set)
    requests: list[tuple[str, str | None]] = field(default_factory=list)


class MirrorServer(http.server.ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, root: Path, behaviour: Behaviour) -> None:
        self.root = root
        self.behaviour = behaviour
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), MirrorHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    server: MirrorServer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        wanted = self.headers.get("Range")
        behaviour.requests.append((self.path, wanted))
        for end in behaviour.silent:
            if self.path.endswith(end):
                self.server.closing.wait()
                return
        for end, statuses in behaviour.replies.items():
            if self.path.endswith(end) and statuses:
                self.send_error(statuses.pop(0))
                return
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = 0
        if wanted and behaviour.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for end, cuts in behaviour.cut.items():
            if self.path.endswith(end) and cuts:
                self.wfile.write(body[: cuts.pop(0)])
                self.close_connection = True
                return
        self.wfile.write(body)


@pytest.fixture(scope="session")
def signing_key() -> pysequoia.Tsk:
    return pysequoia.Tsk.generate("Test Archive <test@example.invalid>")


@pytest.fixture
def archive(tmp_path: Path, signing_key: pysequoia.Tsk) -> SmallArchive:
    """A published archive with a kernel and a busybox."""
    made = SmallArchive(tmp_path / "mirror", signing_key)
    made.add_usual()
    made.publish()
    return made


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def mirror(archive: SmallArchive, behaviour: Behaviour) -> Iterator[MirrorServer]:
    """The archive, served over http."""
    server = MirrorServer(archive.root, behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def make_store(
    tmp_path: Path, archive: SmallArchive, mirror: MirrorServer
) -> Callable[..., ImageStore]:
    """Makes stores that fetch from the small archive and trust its key."""
    keyring = tmp_path / "keyring.pgp"
    keyring.write_bytes(archive.keyring)

    def make(name: str = "store", **settings: object) -> ImageStore:
        values: dict[str, object] = {
            "store": tmp_path / name,
            "debian_mirror": mirror.url,
            "debian_keyring": keyring,
            "retry_seconds": 0,
            "timeout_seconds": 300,
            **settings,
        }
        return ImageStore(
            settings=ImageSettings.model_validate(values),
            apt=AptConfiguration(),
            environment={},
        )

    return make


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small-tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def forms() -> dict[str, Callable[..., bytes]]:
    """Makers of files in the formats that vmlab reads."""
    return {
        "ar": ar_archive,
        "tar": tar_archive,
        "deb": deb_package,
        "module": kernel_module,
        "riscv": riscv_kernel,
        "busybox": busybox_binary,
    }


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool], seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    return wait
