"""Images from the real archive: fetched, verified, assembled, booted in a plain QEMU.

They need a Debian mirror (the host's apt names one) or a store that has been filled before.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import lzma
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.images import gpt
from tests.integration.images.plain_qemu import SECONDS, Guest, needs, needs_qemu
from tests.store import IMAGE_STORE

from vmlab.images import ImageStore
from vmlab.images.debian import openpgp
from vmlab.images.formats import deb, tarball
from vmlab.images.importing import Parts, import_image
from vmlab.images.store.usage import unused
from vmlab.machine.architecture import Architecture


@pytest.fixture(scope="module")
def store() -> ImageStore:
    return ImageStore(IMAGE_STORE)


@pytest.fixture
def booted() -> Iterator[list[Guest]]:
    """Guests that are put here are ended with the test."""
    guests: list[Guest] = []
    yield guests
    for guest in guests:
        guest.close()


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize(
    "name",
    ["debian-12-amd64-tiny", "debian-13-riscv64-tiny", "debian-13-arm64-tiny",
     "debian-13-ppc64el-tiny"],
)  # fmt: skip
def test_tiny_image_of_the_real_archive_boots_and_does_what_it_is_for(
    store: ImageStore, booted: list[Guest], tmp_path: Path, name: str
) -> None:
    image = store.ensure(name)
    needs_qemu(image.architecture)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "note").write_text("from the host")
    panic = ["-device", "pvpanic"] if image.architecture is Architecture.X86_64 else []
    guest = Guest(
        image, "vmlab.hostname=lab7 vmlab.net=dhcp vmlab.modules=dummy", *panic,
        "-fsdev", f"local,id=f,path={tmp_path / 'shared'},security_model=none,readonly=on",
        "-device", "virtio-9p-pci,fsdev=f,mount_tag=share",
        "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n",
        "-device", "virtio-serial-pci", "-chardev", "null,id=c",
        "-device", "virtserialport,chardev=c,name=vmlab.agent",
        "-drive", "if=none,id=d,file=null-co://,format=raw",
        "-device", "virtio-blk-pci,drive=d",
        "-device", "virtio-scsi-pci", "-drive", "if=none,id=e,file=null-co://,format=raw",
        "-device", "scsi-hd,drive=e", "-device", "virtio-rng-pci",
    )  # fmt: skip
    booted.append(guest)
    guest.wait_for(b"Please press Enter")
    guest.type("\n")
    guest.wait_for(rb"lab7:[^\n]*# ")
    # It may find a slow host remarkable, in the middle of what a command prints.
    guest.shell("echo 1 >/proc/sys/kernel/printk")
    assert image.kernel_release in guest.shell("uname -r")
    machine = guest.shell("uname -m")
    assert image.architecture.value in machine
    assert "10.0.2.15" in guest.shell("ip addr show")
    assert "nameserver 10.0.2.3" in guest.shell("cat /etc/resolv.conf")
    assert "vmlab.agent" in guest.shell("ls /dev/virtio-ports")
    assert "/usr/lib/vmlab/agent" in guest.shell("ps")
    guest.shell("ls /dev/vda /dev/sda /dev/hwrng")
    for module in ("ext4", "overlay", "9p", "virtiofs", "loop", "vfat"):
        guest.shell(
            f"modprobe {module} || grep -q /{module}.ko $(echo /lib/modules/*/modules.builtin)"
        )
    guest.shell("grep -q ^dummy /proc/modules")
    if panic:  # the device hangs on the ISA bus, where nothing but ACPI names it
        guest.shell("ls -d /sys/bus/platform/drivers/pvpanic-mmio/QEMU0001:00")
    guest.shell("mount -t 9p -o trans=virtio,version=9p2000.L share /mnt")
    assert "from the host" in guest.shell("cat /mnt/note && umount /mnt")
    guest.shell("for n in 1 2 3 4 5; do mountpoint -q /sys/fs/cgroup && break; sleep 1; done; true")
    # mount(2) makes the kernel ask modprobe, which has its tables.
    guest.shell("dd if=/dev/zero of=/tmp/d bs=1M count=8 2>/dev/null && mkdosfs /tmp/d")
    guest.shell("mount -t vfat -o loop /tmp/d /mnt && echo hi >/mnt/a && umount /mnt")
    guest.type("poweroff\n")
    guest.wait_for(b"Power down|Requesting system poweroff")
    assert guest.process.wait(timeout=SECONDS) == 0


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_tiny_image_with_the_standard_guest_agent_answers_on_its_port_and_shuts_down(
    store: ImageStore, booted: list[Guest], tmp_path: Path
) -> None:
    image = store.ensure("debian-12-amd64-tiny-qga")
    needs_qemu(image.architecture)
    assert image.channels == ("qga", "console")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qga"))
        listener.listen(1)
        listener.settimeout(SECONDS)
        guest = Guest(
            image, "",
            "-device", "virtio-serial-pci", "-chardev", "null,id=c",
            "-device", "virtserialport,chardev=c,name=another.port",
            "-chardev", f"socket,id=q,path={tmp_path / 'qga'}",
            "-device", "virtserialport,chardev=q,name=org.qemu.guest_agent.0",
        )  # fmt: skip
        booted.append(guest)
        connection, _ = listener.accept()
    with connection, connection.makefile("rwb") as stream:
        connection.settimeout(SECONDS)

        def call(name: str, **arguments: object) -> Any:
            words = {"execute": name, "arguments": arguments}
            stream.write(json.dumps(words).encode() + b"\n")
            stream.flush()
            return json.loads(stream.readline())["return"]

        assert call("guest-sync", id=7) == 7
        pid = call("guest-exec", path="/bin/uname", arg=["-r"], **{"capture-output": True})["pid"]
        while not (status := call("guest-exec-status", pid=pid))["exited"]:
            time.sleep(0.05)
        assert base64.b64decode(status["out-data"]).decode().strip() == image.kernel_release
        stream.write(b'{"execute": "guest-shutdown"}\n')  # which is not answered
        stream.flush()
        assert guest.process.wait(timeout=SECONDS) == 0


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_tiny_image_is_the_same_when_it_is_built_again(store: ImageStore) -> None:
    image = store.ensure("debian-12-amd64-tiny")
    recipe = store.recipe("debian-12-amd64-tiny")
    assert recipe is not None
    again, differences = store.build_twice(recipe)
    assert again == image
    assert differences == {}


def test_snapshot_in_use_is_signed_by_debians_keys(store: ImageStore) -> None:
    store.ensure("debian-13-riscv64-tiny")
    release = store.suite("debian", "trixie").snapshot().main
    assert (release.codename, release.origin) == ("trixie", "Debian")
    assert set(release.signers) & set(openpgp.ARCHIVE_KEYS.values())


def test_warm_store_answers_without_apt_and_without_reading_the_image_again(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.ensure("debian-13-riscv64-tiny")

    def nobody(*_: object, **__: object) -> str:
        raise AssertionError("a warm store has no need of this")

    monkeypatch.setattr("vmlab.images.store.store.host_configuration", nobody)
    monkeypatch.setattr("vmlab.images.store.store.sha256", nobody)
    monkeypatch.setattr("vmlab.images.store.blobs.sha256", nobody)
    assert ImageStore(IMAGE_STORE).ensure("debian-13-riscv64-tiny") == image


@pytest.mark.slow
@pytest.mark.timeout(6 * SECONDS)
def test_full_root_boots_to_systemd_with_the_agent_lent_to_it(
    store: ImageStore, booted: list[Guest]
) -> None:
    needs("mmdebstrap", "mke2fs", "debugfs", "depmod")
    image = store.ensure("debian-12-amd64")
    needs_qemu(image.architecture)
    guest = Guest(
        image, "vmlab.hostname=lab8",
        "-device", "virtio-serial-pci", "-chardev", "null,id=c",
        "-device", "virtserialport,chardev=c,name=vmlab.agent",
        "-drive", f"if=none,id=d,file={image.disk},format=raw,snapshot=on",
        "-device", "virtio-blk-pci,drive=d", "-netdev", "user,id=n",
        "-device", "virtio-net-pci,netdev=n", memory="768",
    )  # fmt: skip
    booted.append(guest)
    guest.wait_for(b"lab8 login: ", 2 * SECONDS)
    guest.type("root\n")
    guest.wait_for(rb"root@lab8:[^\n]*# ")
    guest.shell("stty -echo; bind 'set enable-bracketed-paste off' 2>/dev/null; true")
    guest.shell("echo 1 >/proc/sys/kernel/printk")
    assert "Debian GNU/Linux 12" in guest.shell("cat /etc/os-release")
    assert "active" in guest.shell("systemctl is-active vmlab-agent.service")
    guest.shell("python3 -c 'import json'; systemctl is-enabled ssh; test -x /usr/sbin/qemu-ga")
    guest.shell("test -s /boot/vmlinuz-$(uname -r) && test -s /boot/config-$(uname -r)")
    guest.shell("modprobe -n btrfs && test ! -s /etc/apt/sources.list.d/x")
    # QEMU has the disk open: nobody takes it away, although no process of vmlab's holds it.
    with unused(image.directory) as free:
        assert not free
    guest.type("poweroff\n")
    assert guest.process.wait(timeout=SECONDS) == 0


@pytest.fixture
def own_store(store: ImageStore, tmp_path: Path) -> ImageStore:
    """A store for imports, with what was fetched for the other one."""
    root = tmp_path / "store"
    root.mkdir()
    for folder in ("cache", "index"):
        (store.root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder).symlink_to(store.root / folder)
    return ImageStore(root)


def container_root(busybox: Path) -> bytes:
    """What a container's root often is: a few programs, no kernel, no modules, no systemd."""
    contents: dict[str, bytes] = {}
    with deb.data_archive(busybox) as stream:
        for entry, program in tarball.entries(stream, source="busybox"):
            if entry.path.endswith("bin/busybox") and program is not None:
                contents["bin/busybox"] = program.read()
    contents["etc/inittab"] = b"::askfirst:-/bin/sh\n"
    contents["etc/passwd"] = b"root:x:0:0:root:/:/bin/sh\n"
    contents["etc/os-release"] = b"ID=other\n"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for folder in ("dev", "proc", "sys", "run", "tmp", "sbin", "lib"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for link, target in (("bin/sh", "busybox"), ("sbin/init", "../bin/busybox"),
                             ("bin/modprobe", "busybox"), ("bin/ps", "busybox"),
                             ("bin/cat", "busybox"), ("bin/grep", "busybox"),
                             ("bin/sleep", "busybox"), ("bin/mkdir", "busybox")):  # fmt: skip
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        for path, data in contents.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o755
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_root_of_a_container_boots_with_a_kernel_modules_and_agent_lent_to_it(
    store: ImageStore, own_store: ImageStore, booted: list[Guest], tmp_path: Path
) -> None:
    needs("mke2fs", "debugfs")
    needs_qemu(Architecture.X86_64)
    store.ensure("debian-12-amd64-tiny")
    suite = own_store.suite("debian", "bookworm")
    index = suite.index(suite.snapshot(), components=["main"], architecture="amd64")
    tarred = tmp_path / "root.tar.gz"
    tarred.write_bytes(container_root(suite.package(index.get("busybox-static"))))
    image = import_image(own_store, "container", Parts(root=tarred))
    assert (image.architecture, image.channels) == (Architecture.X86_64, ("agent", "console"))
    guest = Guest(
        image, "", "-device", "virtio-serial-pci", "-chardev", "null,id=c",
        "-device", "virtserialport,chardev=c,name=vmlab.agent",
        "-drive", f"if=none,id=d,file={image.disk},format={image.disk_format},snapshot=on",
        "-device", "virtio-blk-pci,drive=d",
    )  # fmt: skip
    booted.append(guest)
    guest.wait_for(b"Please press Enter")
    guest.type("\n")
    guest.wait_for(rb"# ")
    assert "ID=other" in guest.shell("cat /etc/os-release")
    guest.shell("grep -q ' / ext4 ' /proc/mounts")
    guest.shell("modprobe 9p && grep -q ^9pnet /proc/modules")
    assert "/run/vmlab/agent" in guest.shell("ps")


def boot_sector() -> bytes:
    """The first sector of a PC's disk: says so on the first serial port, and stops there."""
    words = b"the boot loader runs\r\n\0"
    code = bytes([
        0x31, 0xC0, 0x8E, 0xD8,  # xor ax, ax; mov ds, ax
        0xBE, 0x14, 0x7C,  # mov si, 0x7c14
        0xBA, 0xF8, 0x03,  # mov dx, 0x3f8: COM1
        0xAC, 0x84, 0xC0,  # next: lodsb; test al, al
        0x74, 0x03,  # jz stop
        0xEE, 0xEB, 0xF8,  # out dx, al; jmp next
        0xF4, 0xFD,  # stop: hlt; (never reached)
    ])  # fmt: skip
    assert len(code) == 0x14
    return (code + words).ljust(510, b"\0") + b"\x55\xaa"


def cloud_layout(disk: Path) -> None:
    """Give a disk the partitions of Debian's generic cloud images, with something in each."""
    code = disk.read_bytes()[:440]
    mebi = 1 << 20
    partitions = [
        gpt.Partition(1, gpt.ROOT, 8192, 2 * mebi),
        gpt.Partition(14, gpt.BIOS_BOOT, 2048, mebi),
        gpt.Partition(15, gpt.EFI_SYSTEM, 4096, 2 * mebi),
    ]
    gpt.write(disk, 8 * mebi, partitions, boot_code=code)
    for part in partitions:
        gpt.place(disk, part.start, os.urandom(part.size))


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("form", ["raw", "raw.xz", "qcow2"])
def test_disk_that_was_imported_boots_by_its_own_boot_loader(
    own_store: ImageStore, booted: list[Guest], tmp_path: Path, form: str
) -> None:
    needs_qemu(Architecture.X86_64)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(boot_sector() + bytes(1 << 20))
    disk = raw
    if form == "raw.xz":
        disk = tmp_path / "disk.raw.xz"
        disk.write_bytes(lzma.compress(raw.read_bytes()))
    elif form == "qcow2":
        needs("qemu-img")
        cloud_layout(raw)
        disk = tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, disk], check=True)
    image = import_image(own_store, "cloud", Parts(disk=disk), architecture=Architecture.X86_64)
    assert (image.kernel, image.disk_format) == (None, form.removesuffix(".xz"))
    assert image.disk is not None
    if form == "qcow2":
        subprocess.run(["qemu-img", "compare", "-q", raw, image.disk], check=True)
    else:
        assert image.disk.read_bytes() == raw.read_bytes()
    guest = Guest(
        image, "", "-drive",
        f"if=none,id=d,file={image.disk},format={image.disk_format},snapshot=on",
        "-device", "virtio-blk-pci,drive=d,bootindex=0", memory="64",
    )  # fmt: skip
    booted.append(guest)
    guest.wait_for(b"the boot loader runs")


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_kernel_and_initramfs_that_were_imported_boot(
    store: ImageStore, own_store: ImageStore, booted: list[Guest], tmp_path: Path
) -> None:
    tiny = store.ensure("debian-12-amd64-tiny")
    needs_qemu(tiny.architecture)
    assert tiny.initrd is not None
    (tmp_path / "initrd.gz").write_bytes(gzip.compress(tiny.initrd.read_bytes(), 1))
    parts = Parts(kernel=tiny.packaged_kernel, initrd=tmp_path / "initrd.gz")
    image = import_image(own_store, "mine", parts, cmdline="panic=-1")
    assert image.kernel_release == tiny.kernel_release
    guest = Guest(image, "quiet")
    booted.append(guest)
    guest.wait_for(b"Please press Enter")
