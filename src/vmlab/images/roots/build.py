"""Full roots: a distribution on a disk image, with a kernel and an initramfs that boot it.

mmdebstrap installs the packages from the store's own snapshot of the archive; the kernel's
modules come straight from its package; ext4 is written by mke2fs. The root boots through the
initramfs of the tiny images, so no initramfs is generated under emulation.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from vmlab.images.builder import (
    Built,
    Inputs,
    LendRoot,
    build_initramfs,
    kernel_files,
    root_digest,
)
from vmlab.images.debian.index import Package, PackageIndex
from vmlab.images.debian.openpgp import archive_keys, binary_keyring
from vmlab.images.debian.suite import Snapshot, Suite
from vmlab.images.errors import BuildFailed
from vmlab.images.formats import tarball
from vmlab.images.formats.tarball import TarEntry
from vmlab.images.progress import Progress, reading, watched
from vmlab.images.recipe import Form, Recipe
from vmlab.images.roots import confinement, ext4, tools
from vmlab.images.roots.mirror import serving
from vmlab.images.tiny.build import KernelFiles, unpack_kernel
from vmlab.images.tiny.tree import merged
from vmlab.machine.architecture import host_architecture

CMDLINE = f"root=LABEL={ext4.LABEL}"
_NEWLY_INSTALLED = re.compile(rb"\n\d+ upgraded, (\d+) newly installed")


def check_tools(recipe: Recipe) -> dict[str, str]:
    """The programs that a recipe's root needs, before anything is fetched for it.

    Raises:
        ToolMissing: naming what to install.
    """
    names = ["mmdebstrap", "mke2fs", "debugfs", "depmod"]
    names += ["qemu-img"] if recipe.format is Form.QCOW2 else []
    found = tools.require(names, what=f"building {recipe.name}")
    confinement.check(recipe.architecture, what=f"building {recipe.name}")
    return found


def build_root(
    recipe: Recipe,
    suite: Suite,
    snapshot: Snapshot,
    given: Inputs,
    directory: Path,
    *,
    kernel: Package,
    kernel_deb: Path,
    index: PackageIndex,
    lend_root: LendRoot,
    progress: Progress,
) -> Built:
    """Build a full root in `directory`. See `vmlab.images.builder.build`.

    Raises:
        ToolMissing: naming what to install.
        BuildFailed: a tool failed; its last lines are in the message.
    """
    check_tools(recipe)
    scratch = directory / "unpacked"
    scratch.mkdir()
    files = unpack_kernel(kernel_deb, scratch, progress=progress)
    busybox = suite.package(index.get("busybox-static"), progress=progress)
    tiny = recipe.model_copy(update={"scripts": ()})
    initramfs_inputs = Inputs(given.agent)
    build_initramfs(
        tiny, files, [busybox], initramfs_inputs, directory / "initrd",
        mtime=snapshot.date, progress=progress,
    )  # fmt: skip
    disk = directory / "disk"
    digest = root_digest(recipe, snapshot.digest, given)
    packages = lend_root(digest, disk)
    if packages is None:
        packages = _build_disk(
            recipe, suite, snapshot, given, directory, disk=disk, kernel=files, seed=digest,
            progress=progress,
        )  # fmt: skip
    return Built(
        files={
            **kernel_files(files.image, directory, progress=progress),
            "initrd": directory / "initrd",
            "disk": disk,
        },
        kernel_release=files.release,
        packages={**packages, kernel.name: kernel.version},
        disk_format=recipe.format.value,
        cmdline=CMDLINE,
        root=digest,
    )


def _build_disk(
    recipe: Recipe,
    suite: Suite,
    snapshot: Snapshot,
    given: Inputs,
    directory: Path,
    *,
    disk: Path,
    kernel: KernelFiles,
    seed: str,
    progress: Progress,
) -> dict[str, str]:
    """Install the root and write it to `disk`; returns its packages and their versions."""
    found = check_tools(recipe)
    tarred = directory / "root.tar"
    _install(
        recipe, suite, snapshot, directory,
        output=tarred, mmdebstrap=found["mmdebstrap"], progress=progress,
    )  # fmt: skip
    root = directory / "root"
    root.mkdir()
    step = f"unpacking the root of {recipe.name}"
    with tarred.open("rb") as stream, watched(step, progress, reading(stream)):
        entries = tarball.extract(stream, root, source="root.tar")
    tarred.unlink()
    packages = dict(_installed(root))
    entries += _add_files(root, given, snapshot.date)
    entries += _add_kernel(root, kernel, snapshot.date)
    if kernel.modules is not None:
        entries += _add_modules(root, kernel.modules, found["depmod"], directory, snapshot.date)
    raw = disk if recipe.format is Form.RAW else directory / "disk.raw"
    ext4.make(
        root, entries, raw, size=recipe.size or 0, seed=seed, epoch=snapshot.date,
        scratch=directory, progress=progress,
    )  # fmt: skip
    if recipe.format is Form.QCOW2:
        with watched("converting the disk to qcow2", progress, lambda: (_allocated(disk), None)):
            tools.run(
                [found["qemu-img"], "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)],
                what="converting the disk", log=directory / "qemu-img.log",
            )  # fmt: skip
    return packages


def _install(
    recipe: Recipe,
    suite: Suite,
    snapshot: Snapshot,
    directory: Path,
    *,
    output: Path,
    mmdebstrap: str,
    progress: Progress,
) -> None:
    """Let mmdebstrap(1) install the recipe's packages into a tar archive."""
    keyring = directory / "keyring.gpg"
    keyring.write_bytes(binary_keyring(suite.keys or archive_keys()))
    architecture = recipe.architecture
    step = f"installing {len(recipe.packages)} packages and what they need"
    log = directory / "mmdebstrap.log"
    with serving(
        suite, snapshot, components=recipe.components, architecture=architecture.debian,
        progress=progress,
    ) as (sources, failures):  # fmt: skip
        command = [
            mmdebstrap,
            "--verbose",  # apt and dpkg tell how far they are
            "--mode=root",  # of namespaces of its own
            "--variant=minbase",
            "--format=tar",
            f"--architectures={architecture.debian}",
            f"--include={','.join(recipe.packages)}",
            # The dates were checked when the snapshot was fetched.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=Acquire::Check-Date "false"',
            '--aptopt=Acquire::http::Proxy "DIRECT"',
            '--aptopt=Acquire::Languages "none"',
            # The keyring and the packages are where only the builder may look.
            '--aptopt=APT::Sandbox::User "root"',
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            *(f"--customize-hook={hook}" for hook in _hooks(recipe)),
            suite.name,
            str(output),
            *(
                f"deb [signed-by={keyring}] {source.url} {source.suite} "
                f"{' '.join(source.components)}"
                for source in sources
            ),
        ]
        if architecture is not host_architecture():
            command.insert(1, "--skip=check/qemu")
        ready = confinement.confined(command, architecture)
        try:
            with watched(step, progress, lambda: _installed_so_far(log), unit="packages"):
                tools.run(
                    ready.command,
                    what=f"installing the packages of {recipe.name}",
                    log=log,
                    environment={"SOURCE_DATE_EPOCH": str(snapshot.date), "TMPDIR": str(directory)},
                    admit=ready.admit,
                )
        except BuildFailed:
            if failures:
                raise failures[0] from None  # why a package could not be had tells more
            raise


def _installed_so_far(log: Path) -> tuple[int, int | None]:
    """How many packages dpkg has set up, and how many apt has said that it will, apt-get(8)."""
    text = log.read_bytes()
    total = sum(int(count) for count in _NEWLY_INSTALLED.findall(text))
    return min(text.count(b"\nSetting up "), total), total or None


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def _hooks(recipe: Recipe) -> Iterator[str]:
    """Shell commands that mmdebstrap runs with the root's path as $1."""
    yield 'printf "vmlab\\n" >"$1/etc/hostname"'
    yield 'printf "127.0.0.1 localhost\\n127.0.1.1 vmlab\\n::1 localhost\\n" >"$1/etc/hosts"'
    yield f'printf "LABEL={ext4.LABEL} / ext4 defaults 0 1\\n" >"$1/etc/fstab"'
    # The mirror of the build is gone with it, and no other is anybody's to choose.
    yield (
        f'printf "# deb URL-OF-A-MIRROR {recipe.suite} {" ".join(recipe.components)}\\n" '
        '>"$1/etc/apt/sources.list"'
    )
    # What differs with every installation is made when a machine first boots.
    yield 'rm -f "$1"/etc/ssh/ssh_host_*'
    yield ': >"$1/etc/machine-id"'
    yield 'rm -rf "$1"/var/log/*.log "$1"/var/log/apt "$1"/var/cache/ldconfig/aux-cache'
    yield 'rm -f "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old'
    # An empty password: who can reach a lab's console may log in.
    yield 'chroot "$1" passwd --delete root'
    for script in recipe.scripts:
        if script.when == "build":
            yield f'chroot "$1" /bin/sh -ec {_shell_quoted(script.text)}'


def _shell_quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _add_files(root: Path, given: Inputs, epoch: int) -> list[TarEntry]:
    """Put the recipe's files into the unpacked root."""
    entries = []
    for name, (data, mode) in given.files.items():
        path = _resolved(root, merged(name))
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.write_bytes(data)
        entries.append(TarEntry(path, "file", mode, 0, 0, epoch, size=len(data)))
    return entries


def _resolved(root: Path, path: str) -> str:
    """`path` as it is, if nothing on its way is a symlink.

    Raises:
        BuildFailed: something is, and the file would land elsewhere.
    """
    current = root
    for part in Path(path).parts[:-1]:
        current /= part
        if current.is_symlink():
            raise BuildFailed(
                f"the recipe's file /{path} lies below a symlink of the root",
                hint="give the path that the symlink leads to",
            )
    return path


def _add_kernel(root: Path, kernel: KernelFiles, epoch: int) -> list[TarEntry]:
    """Put the kernel and its configuration where kexec, criu and perf look for them."""
    entries = [TarEntry("boot", "directory", 0o755, 0, 0, epoch)]
    (root / "boot").mkdir(exist_ok=True)
    for source in (kernel.image, kernel.config):
        if source is not None:
            shutil.copyfile(source, root / "boot" / source.name)
            size = source.stat().st_size
            entries.append(TarEntry(f"boot/{source.name}", "file", 0o644, 0, 0, epoch, size=size))
    return entries


def _add_modules(
    root: Path, modules: Path, depmod: str, scratch: Path, epoch: int
) -> list[TarEntry]:
    """Move the kernel's modules into the unpacked root, with the tables for modprobe."""
    release = modules.name
    target = root / "usr" / "lib" / "modules" / release
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # headers put a link there
        for path in sorted(modules.rglob("*"), key=lambda path: len(path.parts)):
            place = target / path.relative_to(modules)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                shutil.move(path, place)
    else:
        shutil.move(modules, target)
    tools.run(
        [depmod, "--basedir", str(root), release], what="listing the kernel's modules",
        log=scratch / "depmod.log",
    )  # fmt: skip
    return [
        TarEntry(
            path.relative_to(root).as_posix(),
            "directory" if path.is_dir() else "file",
            0o755 if path.is_dir() else 0o644,
            0,
            0,
            epoch,
        )
        for path in (target.parent, target, *target.rglob("*"))
        if not path.is_symlink()
    ]


def _installed(root: Path) -> Iterator[tuple[str, str]]:
    """Names and versions of the installed packages, from dpkg's status."""
    from vmlab.images.formats.control import paragraphs

    text = (root / "var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    for fields in paragraphs(text, source="dpkg status"):
        if fields.get("Status", "").endswith(" installed"):
            yield fields["Package"], fields.get("Version", "")
