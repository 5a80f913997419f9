"""A cloud image is imported, boots by its own boot loader, and answers as cloud-init set it up.

The image is made here, with the structure of Debian's generic cloud images: minutes of work and a
Debian mirror, so only `make soak` runs it. What has the structure alone is in test_real_images.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.integration.images import gpt
from tests.integration.images.plain_qemu import SECONDS, Guest, needs
from tests.store import IMAGE_STORE

from vmlab.guests.command import Command
from vmlab.guests.ssh import SshChannel
from vmlab.guests.ssh_keys import MachineKeys
from vmlab.images import ImageStore
from vmlab.images.importing import Parts, import_image
from vmlab.machine.architecture import Architecture

MEBI = 1 << 20

RECIPE = """
name = "cloud-root"
suite = "bookworm"
architecture = "x86_64"
format = "raw"
size = "1500M"
kernel = "linux-image-cloud-amd64"
packages = [
    "systemd-sysv", "udev", "dbus", "login", "passwd", "iproute2", "netplan.io", "systemd-resolved",
    "cloud-init", "openssh-server", "sudo", "linux-image-cloud-amd64", "initramfs-tools",
    "grub-pc-bin", "grub-common",
]

[[files]]
path = "/boot/grub/grub.cfg"
text = '''
serial --unit=0 --speed=115200
terminal_output serial
echo "GRUB of the disk's own"
linux /vmlinuz root=LABEL=vmlab-root ro console=ttyS0 tsc=reliable no_timer_check mitigations=off
initrd /initrd.img
boot
'''

[[files]]
path = "/etc/cloud/cloud.cfg.d/90-datasource.cfg"
text = "datasource_list: [ NoCloud, None ]"

# As in Debian's cloud images: without it cloud-init sets a locale that has to be generated first.
[[files]]
path = "/etc/default/locale"
text = "LANG=C.UTF-8"

[[scripts]]
name = "bootable"
when = "build"
text = '''
ln -sf boot/vmlinuz-* /vmlinuz
test -e /initrd.img || ln -s boot/initrd.img-* /initrd.img
grub-mkimage -O i386-pc -p '(hd0,gpt1)/boot/grub' -o /boot/grub-core.img \
    biosdisk part_gpt ext2 normal linux serial terminal echo boot
'''
"""

USER_DATA = """#cloud-config
hostname: from-the-cloud
ssh_pwauth: false
users:
  - name: lab
    shell: /bin/bash
    sudo: ALL=(ALL) NOPASSWD:ALL
    lock_passwd: false
    plain_text_passwd: open sesame
    ssh_authorized_keys: [{key}]
runcmd: [[sh, -c, "echo cloud-init is through >/dev/ttyS0"]]
"""

STATUS = r"""
cloud-init status --wait --long ||
{ sudo -n grep -i -B2 -A12 'error\|warn\|fail\|traceback' /var/log/cloud-init.log; false; }
"""
"""It is told that all modules did what they had to, or which did not and why."""


@pytest.fixture
def seed(tmp_path: Path) -> Iterator[tuple[int, MachineKeys]]:
    """A server of cloud-init's NoCloud data on a free port, and the key that it lets in."""
    keys = MachineKeys(tmp_path / "keys")
    texts = {
        "/user-data": USER_DATA.format(key=json.dumps(keys.public())),
        "/meta-data": "instance-id: i-1\n",
        "/vendor-data": "",
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = texts.get(self.path)
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, keys
        server.shutdown()
        thread.join()


def file_in(root: Path, path: str, scratch: Path) -> bytes:
    """A file of an ext4 file system."""
    out = scratch / "dumped"
    command = ["debugfs", "-R", f"dump {path} {out}", str(root)]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_bytes()


def cloud_disk(root: Path, scratch: Path) -> Path:
    """A qcow2 with partitions and GRUB for BIOS around a root file system."""
    disk = scratch / "disk.raw"
    start, size = 128 * MEBI // gpt.SECTOR, root.stat().st_size
    bios, efi = 2048, 8192
    boot, core = gpt.grub(
        file_in(root, "/usr/lib/grub/i386-pc/boot.img", scratch),
        file_in(root, "/boot/grub-core.img", scratch),
        bios,
    )
    partitions = [
        gpt.Partition(1, gpt.ROOT, start, size),
        gpt.Partition(14, gpt.BIOS_BOOT, bios, 3 * MEBI),
        gpt.Partition(15, gpt.EFI_SYSTEM, efi, 124 * MEBI),
    ]
    assert len(core) <= 3 * MEBI
    gpt.write(disk, start * gpt.SECTOR + size + MEBI, partitions, boot_code=boot)
    gpt.place(disk, bios, core)
    subprocess.run(
        ["dd", f"if={root}", f"of={disk}", "bs=1M", "seek=128", "conv=notrunc,sparse"],
        check=True, capture_output=True,
    )  # fmt: skip
    made = scratch / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(made)], check=True
    )
    disk.unlink()
    return made


def free_port() -> int:
    """A port that was free just now: QEMU tells of no other way which one it took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def by_ssh(port: int, keys: MachineKeys, text: str) -> str:
    channel = SshChannel(("127.0.0.1", port), user="lab", keys=keys)
    said = bytearray()

    async def take(data: bytes) -> None:
        said.extend(data)

    try:
        await channel.connect(timeout=SECONDS)
        assert await channel.run(Command(text), stdout=take, stderr=take) == 0, said
    finally:
        await channel.close()
    return said.decode()


@pytest.mark.soak
def test_cloud_image_boots_by_its_own_boot_loader_and_is_what_cloud_init_made_of_it(
    tmp_path: Path, seed: tuple[int, MachineKeys]
) -> None:
    needs("qemu-system-x86_64", "mmdebstrap", "mke2fs", "debugfs", "depmod", "qemu-img")
    store_path = tmp_path / "store"
    store_path.mkdir()
    for folder in ("cache", "index"):
        (IMAGE_STORE / folder).mkdir(parents=True, exist_ok=True)
        (store_path / folder).symlink_to(IMAGE_STORE / folder)
    store = ImageStore(store_path)
    recipe = tmp_path / "cloud.toml"
    recipe.write_text(RECIPE)
    root = store.ensure(recipe).disk
    assert root is not None
    disk = cloud_disk(root, tmp_path)

    image = import_image(store, "cloud", Parts(disk=disk), architecture=Architecture.X86_64)
    assert (image.kernel, image.initrd, image.disk_format) == (None, None, "qcow2")
    assert image.channels == ("qga", "ssh", "console")
    served, keys = seed
    port = free_port()
    guest = Guest(
        image, "",
        "-drive", f"if=none,id=d,file={image.disk},format=qcow2,snapshot=on",
        "-device", "virtio-blk-pci,drive=d,bootindex=0",
        "-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22",
        "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci",
        "-smbios", f"type=1,serial=ds=nocloud-net;s=http://10.0.2.2:{served}/",
        memory="768",
    )  # fmt: skip
    try:
        guest.wait_for(b"GRUB of the disk's own", 2 * SECONDS)
        guest.wait_for(b"cloud-init is through", 6 * SECONDS)
        found = asyncio.run(
            by_ssh(port, keys, "hostname; uname -r; sudo -n id -u; cloud-init query instance_id")
        )
        name, release, uid, instance = found.splitlines()
        assert (name, uid, instance) == ("from-the-cloud", "0", "i-1")
        assert re.fullmatch(r"6\.1\..*-cloud-amd64", release)
        assert "status: done" in asyncio.run(by_ssh(port, keys, STATUS))
        guest.type("\n")
        guest.wait_for(b"from-the-cloud login: ")
        guest.type("lab\n")
        guest.wait_for(b"Password: ")
        guest.type("open sesame\n")
        guest.wait_for(rb"lab@from-the-cloud:[^\n]*\$ ")
        guest.shell("stty -echo; bind 'set enable-bracketed-paste off' 2>/dev/null; true")
        assert "/dev/vda1" in guest.shell("lsblk -no PATH /dev/vda; findmnt -no SOURCE /")
    finally:
        guest.close()
