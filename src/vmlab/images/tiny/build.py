"""Putting a tiny image together: packages in, kernel and initramfs out.

Nothing here looks at a clock, a host name or the order of a directory: the same inputs give the
same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from vmlab.images.errors import FormatError, ImageError
from vmlab.images.formats import deb, tarball
from vmlab.images.progress import Progress, silent
from vmlab.images.tiny import busybox
from vmlab.images.tiny.modules import ModuleTree, Selection, tables
from vmlab.images.tiny.tree import Tree, merged

_MODULES_ROOT = re.compile(r"(?:usr/)?lib/modules/([^/]+)/(.+)")
_KERNEL = re.compile(r"boot/vmlinu[xz]-(.+)")
_CONFIG = re.compile(r"boot/config-(.+)")
# What a guest of a few megabytes has no use for.
_LEFT_OUT = ("usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/locale/",
             "usr/share/lintian/", "usr/share/bug/", "usr/share/initramfs-tools/")  # fmt: skip
_SCRIPTS = {
    "init.sh": "init",
    "hotplug.sh": "usr/lib/vmlab/hotplug",
    "late.sh": "usr/lib/vmlab/late",
    "lend-agent.sh": "usr/lib/vmlab/lend-agent",
    "udhcpc.sh": "etc/udhcpc/default.script",
}
AGENT_PATH = "usr/lib/vmlab/agent"

_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/shadow": "root::19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/shells": "/bin/sh\n",
    "etc/profile": "export PATH=/usr/bin HOME=/root TERM=${TERM:-linux}\nPS1='\\h:\\w\\$ '\n",
    # busybox acpid: the power button (EV_KEY, KEY_POWER) turns the machine off.
    "etc/acpi/PWRF/00000080": "#!/bin/sh\nexec poweroff\n",
}


@dataclass(frozen=True)
class KernelFiles:
    """A kernel, its modules and its configuration, unpacked, as far as they are there.

    `modules` is the directory RELEASE.
    """

    image: Path
    release: str
    modules: Path | None
    config: Path | None = None


@dataclass(frozen=True)
class Contents:
    """What goes into an initramfs beside the packages.

    `files` maps paths in the guest to (contents, mode); `boot_scripts` names to texts; `agent` is
    the agent's script, or None for an image without one.
    """

    agent: bytes | None = None
    files: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)
    boot_scripts: Mapping[str, str] = field(default_factory=dict)


def own_scripts() -> dict[str, bytes]:
    """vmlab's own files for the guest, by the name they have in this package."""
    folder = resources.files("vmlab.images.tiny")
    return {name: (folder / name).read_bytes() for name in _SCRIPTS}


def unpack_kernel(package: Path, directory: Path, *, progress: Progress = silent) -> KernelFiles:
    """Unpack the kernel and the modules of a kernel package into an empty directory.

    Raises:
        FormatError: the package is damaged or holds no kernel.
    """
    step = f"unpacking {package.name if len(package.name) != 64 else 'the kernel'}"
    with deb.data_archive(package, step=step, progress=progress) as stream:
        entries = tarball.extract(
            stream,
            directory,
            source=package.name,
            select=lambda path: any(
                pattern.fullmatch(path) for pattern in (_KERNEL, _CONFIG, _MODULES_ROOT)
            ),
        )
    for entry in entries:
        match = _KERNEL.fullmatch(entry.path)
        if match is not None and entry.kind == "file":
            folders = [directory / base / match[1] for base in ("lib/modules", "usr/lib/modules")]
            modules = next((folder for folder in folders if folder.is_dir()), None)
            config = directory / "boot" / f"config-{match[1]}"
            return KernelFiles(
                directory / entry.path, match[1], modules, config if config.is_file() else None
            )
    raise FormatError(f"{package.name} holds no kernel (no boot/vmlinuz-* or boot/vmlinux-*)")


def module_tree(
    directory: Path, release: str, *, told: Callable[[int], None] = lambda size: None
) -> ModuleTree:
    """The modules in a directory such as /lib/modules/RELEASE, or in any directory of .ko files.

    `told` is called with the bytes of every module that is read.
    """

    def read(path: str) -> bytes:
        data = (directory / path).read_bytes()
        told(len(data))
        return data

    paths = [
        path.relative_to(directory).as_posix()
        for pattern in ("*.ko", "*.ko.xz", "*.ko.zst", "*.ko.gz")
        for path in directory.rglob(pattern)
        if path.is_file()
    ]
    builtin = directory / "modules.builtin"
    return ModuleTree(
        release,
        paths,
        read=read,
        size=lambda path: (directory / path).stat().st_size,
        builtin=builtin.read_text(errors="replace") if builtin.is_file() else "",
    )


def initramfs(
    output: Path,
    packages: Iterable[Path],
    *,
    contents: Contents,
    release: str,
    modules: Selection | None,
    builtin: Path | None = None,
    mtime: int,
) -> None:
    """Write an initramfs.

    Args:
        output: The file to write.
        packages: The .debs to unpack into it; one of them has to bring busybox.
        contents: What else goes in.
        release: The kernel's release, for the modules' directory.
        modules: The modules to put in.
        builtin: A directory with the kernel's modules.builtin files.
        mtime: The time of every file, seconds since 1970.

    Raises:
        FormatError: a package is damaged.
        ImageError: no package has a busybox.
    """
    tree = Tree(mtime=mtime)
    _skeleton(tree)
    for package in packages:
        add_package(tree, package)
    _applets(tree)
    if modules is not None:
        _add_modules(tree, release, modules, builtin)
    for name, data in own_scripts().items():
        tree.file(_SCRIPTS[name], data, 0o755)
    if contents.agent is not None:
        tree.file(AGENT_PATH, contents.agent, 0o755)
    tree.directory("usr/lib/vmlab/boot.d")
    for name, text in contents.boot_scripts.items():
        body = text if text.startswith("#!") else f"#!/bin/sh\n{text}"
        tree.file(f"usr/lib/vmlab/boot.d/{name}", body.encode(), 0o755)
    for path, (data, mode) in contents.files.items():
        tree.file(path, data, mode)
    with output.open("wb") as file:
        tree.write(file)


def _skeleton(tree: Tree) -> None:
    for path in ("dev", "proc", "sys", "run", "mnt", "etc", "usr/share", "var/log", "sysroot"):
        tree.directory(path)
    tree.directory("root", 0o700)
    tree.directory("tmp", 0o1777)
    tree.symlink("var/run", "../run")
    tree.symlink("etc/mtab", "../proc/self/mounts")
    # The kernel opens /dev/console for init before anything is mounted (init/main.c).
    tree.device("dev/console", "character", 0o600, (5, 1))
    tree.device("dev/null", "character", 0o666, (1, 3))
    for path, text in _TEXTS.items():
        mode = 0o755 if path.startswith("etc/acpi") else 0o600 if path == "etc/shadow" else 0o644
        tree.file(path, text.encode(), mode)


def add_package(tree: Tree, package: Path) -> None:
    """Put a package's files into the tree; its scripts are not run.

    Raises:
        FormatError: the package is damaged.
    """
    known: dict[str, tuple[bytes, int]] = {}
    with deb.data_archive(package) as stream:
        for entry, contents in tarball.entries(stream, source=package.name):
            path = merged(entry.path)
            if not path or path.startswith(_LEFT_OUT):
                continue
            if contents is not None:
                known[path] = (contents.read(), entry.mode)
                tree.file(path, *known[path])
            elif entry.kind == "hardlink" and merged(entry.target) in known:
                tree.file(path, *known[merged(entry.target)])
            elif entry.kind == "symlink":
                tree.symlink(path, entry.target)
            elif entry.kind == "directory":
                tree.directory(path, entry.mode)


def _applets(tree: Tree) -> None:
    binary = next((entry for entry in tree.entries() if entry.path == "usr/bin/busybox"), None)
    if binary is None or binary.kind != "file":
        raise ImageError(
            "no package of the recipe brings a busybox, which a tiny image boots with",
            hint='add "busybox-static" to the recipe\'s packages',
        )
    for name in busybox.applets(binary.data, source="busybox"):
        if f"usr/bin/{name}" not in tree:
            tree.symlink(f"usr/bin/{name}", "busybox")


def _add_modules(tree: Tree, release: str, selection: Selection, builtin: Path | None) -> None:
    base = f"usr/lib/modules/{release}"
    for module in selection.modules:
        tree.file(f"{base}/{module.path}", module.data)
    for name, text in tables(selection.modules).items():
        tree.file(f"{base}/{name}", text.encode())
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        source = builtin / name if builtin is not None else None
        if source is not None and source.is_file():
            tree.file(f"{base}/{name}", source.read_bytes())
    # One line each, so that the guest's shell reads them without starting anything.
    tree.file("usr/lib/vmlab/modules.load", (" ".join(selection.load) + "\n").encode())
    tree.file("usr/lib/vmlab/modules.late", (" ".join(selection.late) + "\n").encode())
