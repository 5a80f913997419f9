"""Which kernel modules a guest gets, with all that they need, in an order that loads.

A package has no modules.dep (it is made where the package is installed), so the dependencies are
read from the modules themselves; the tables for modprobe(8) are written for what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vmlab.images.errors import ImageError
from vmlab.images.formats import modinfo
from vmlab.images.formats.modinfo import ModuleInfo, module_name

# What a guest in a lab meets; init loads the drivers of devices that are there by itself, the
# late ones are for what is plugged in afterwards. A question mark: left out where the kernel has
# it neither as a module nor built in.
LAB_LOAD = ("virtio_pci?", "virtio_mmio?", "virtio_console", "vmgenid?")
LAB_LATE = (
    "virtio_blk", "virtio_net", "virtio_scsi", "sd_mod", "virtio_rng", "virtio_balloon",
    "9pnet_virtio?", "button?", "gpio_keys?", "evdev?", "virtio_mem?",
)  # fmt: skip
LAB_AVAILABLE = (
    "9p?", "virtiofs?", "ext4", "overlay", "vfat", "nls_ascii?", "nls_cp437?", "nls_utf8?",
    "loop", "squashfs?", "dm_mod?", "isofs?", "sr_mod?", "crc32c_generic?",
    "af_packet?", "veth?", "bridge?", "tun?", "dummy?", "vmw_vsock_virtio_transport?",
    "virtio_input?", "virtio_pmem?", "virtio_crypto?", "nbd?", "fuse?", "zram?",
    "pci_hotplug?", "acpiphp?", "configfs?", "softdog?", "i6300esb?",
    "pvpanic_mmio?", "pvpanic_pci?",
)  # fmt: skip


@dataclass(frozen=True)
class Module:
    """A chosen module: its path below /lib/modules/RELEASE, and its uncompressed ELF file."""

    path: str
    info: ModuleInfo
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Selection:
    """The chosen modules, each after what it needs, and the names to load at boot."""

    modules: tuple[Module, ...]
    load: tuple[str, ...]
    late: tuple[str, ...]


class ModuleTree:
    """The modules of one kernel.

    Args:
        release: The kernel's release.
        paths: The modules' paths below /lib/modules/RELEASE.
        read: Returns the file at one of these paths, as it is packed.
        size: Returns the bytes of that file.
        builtin: The contents of modules.builtin.
    """

    def __init__(
        self,
        release: str,
        paths: Iterable[str],
        *,
        read: Callable[[str], bytes],
        size: Callable[[str], int],
        builtin: str,
    ) -> None:
        self.release = release
        self._paths = {module_name(path): path for path in sorted(paths)}
        self._read = read
        self._size = size
        self._builtin = {module_name(line) for line in builtin.split()}
        self._known: dict[str, Module] = {}

    def own(self, *, limit: int) -> tuple[str, ...]:
        """The names of all modules; beyond `limit` bytes only of those from outside the kernel.

        Those are in the directories where `make modules_install` puts external modules.
        """
        total = sum(self._size(path) for path in self._paths.values())
        return tuple(
            sorted(
                name
                for name, path in self._paths.items()
                if total <= limit or not path.startswith("kernel/")
            )
        )

    def select(
        self, load: Iterable[str], late: Iterable[str], available: Iterable[str]
    ) -> Selection:
        """The modules of these names with what they depend on.

        Raises:
            ImageError: the kernel has no such module, and the name does not end with "?".
        """
        chosen: dict[str, Module] = {}
        names = {
            group: tuple(self._add(name, chosen) for name in wanted)
            for group, wanted in (("load", load), ("late", late), ("available", available))
        }
        return Selection(
            tuple(chosen.values()),
            load=tuple(name for name in names["load"] if name in chosen),
            late=tuple(name for name in names["late"] if name in chosen),
        )

    def _add(self, wanted: str, chosen: dict[str, Module]) -> str:
        name = module_name(wanted.removesuffix("?"))
        if name in self._paths:
            self._require(name, chosen, (name,))
        elif name not in self._builtin and not wanted.endswith("?"):
            raise ImageError(
                f"the kernel {self.release} has no module {name!r}, neither as a file nor built in",
                hint=f"correct the recipe's modules, or write {name + '?'!r} if it can do without",
            )
        return name

    def _require(self, name: str, chosen: dict[str, Module], trail: tuple[str, ...]) -> None:
        if name in chosen:
            return
        module = self._module(name)
        for needed in (*module.info.before, *module.info.depends):
            if needed in trail:
                continue  # a softdep may point back; depmod refuses real cycles
            if needed in self._paths:
                self._require(needed, chosen, (*trail, needed))
            elif needed in module.info.depends and needed not in self._builtin:
                raise ImageError(
                    f"module {name!r} of the kernel {self.release} needs {needed!r}, which is "
                    "not there",
                    hint="the modules directory is not complete",
                )
        chosen[name] = module
        for wished in module.info.after:
            if wished in self._paths and wished not in trail:
                self._require(wished, chosen, (*trail, wished))

    def _module(self, name: str) -> Module:
        if name not in self._known:
            path = self._paths[name]
            data = modinfo.unpacked(self._read(path), source=path)
            plain = path
            for suffix in (".xz", ".zst", ".gz"):
                plain = plain.removesuffix(suffix)
            self._known[name] = Module(plain, modinfo.read(data, source=path), data)
        return self._known[name]


def tables(modules: Iterable[Module]) -> dict[str, str]:
    """modules.dep, modules.alias and modules.softdep for modprobe, modules.dep(5)."""
    by_name = {module_name(module.path): module for module in modules}
    dep, alias, softdep = [], [], ["# Soft dependencies extracted from modules themselves."]
    for name, module in by_name.items():
        needed = [by_name[other].path for other in _needs(name, by_name)]
        dep.append(f"{module.path}:{''.join(' ' + path for path in needed)}")
        alias += [f"alias {pattern} {name}" for pattern in module.info.aliases]
        if module.info.before or module.info.after:
            words = ["softdep", name]
            words += ["pre:", *module.info.before] if module.info.before else []
            words += ["post:", *module.info.after] if module.info.after else []
            softdep.append(" ".join(words))
    return {
        file: "".join(f"{line}\n" for line in lines)
        for file, lines in (
            ("modules.dep", dep), ("modules.alias", alias), ("modules.softdep", softdep)
        )
    }  # fmt: skip


def _needs(name: str, by_name: dict[str, Module]) -> list[str]:
    """All that a module needs, the nearest first: modprobe loads the row from its end."""
    loading: dict[str, None] = {name: None}  # in the order of being met; seen once each
    order: list[str] = []

    def visit(current: str) -> None:
        for needed in by_name[current].info.depends:
            if needed in by_name and needed not in loading:
                loading[needed] = None
                visit(needed)
                order.append(needed)

    visit(name)
    return order[::-1]
