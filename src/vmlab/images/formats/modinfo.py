"""What a kernel module says of itself: the `.modinfo` section of its ELF file.

Not modprobe: dependencies are followed in `vmlab.images.tiny.modules`. The section is a row of
NUL-terminated `key=value` texts (include/linux/moduleparam.h, `__MODULE_INFO`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from vmlab.images.errors import FormatError
from vmlab.images.formats.compression import decompress

_MODULE_BYTES_AT_MOST = 256 << 20


@dataclass(frozen=True)
class ModuleInfo:
    """A module's own description; names have underscores, never dashes.

    `depends` are modules that have to be loaded before, `before` and `after` those that the
    module only asks for (softdep), `aliases` the names that it answers to.
    """

    name: str
    depends: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    vermagic: str = ""


def module_name(name: str) -> str:
    """The one spelling of a module's name: no directory, no suffix, underscores."""
    base = name.rsplit("/", 1)[-1]
    for suffix in (".xz", ".zst", ".gz"):
        base = base.removesuffix(suffix)
    return base.removesuffix(".ko").replace("-", "_")


def unpacked(data: bytes, *, source: str) -> bytes:
    """A module's ELF file, decompressed where it is .ko.xz, .ko.zst or .ko.gz.

    Raises:
        FormatError: the data is corrupt.
    """
    return decompress(data, source=source, limit=_MODULE_BYTES_AT_MOST)


def read(module: bytes, *, source: str) -> ModuleInfo:
    """The information in an uncompressed module.

    Raises:
        FormatError: it is not an ELF file, or has no `.modinfo` section.
    """
    section = _modinfo_section(module, source)
    values: dict[str, list[str]] = {}
    for item in section.split(b"\0"):
        key, equals, value = item.partition(b"=")
        if equals:
            values.setdefault(key.decode("ascii", "replace"), []).append(
                value.decode("utf-8", "replace")
            )
    before, after = _soft(values.get("softdep", []))
    return ModuleInfo(
        name=module_name(values.get("name", [source])[0]),
        depends=_names(",".join(values.get("depends", [])).split(",")),
        before=before,
        after=after,
        aliases=tuple(values.get("alias", [])),
        vermagic=values.get("vermagic", [""])[0],
    )


def _modinfo_section(module: bytes, source: str) -> bytes:
    from elftools.common.exceptions import ELFError, ELFParseError
    from elftools.construct import ConstructError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
        data = section.data() if section is not None else None
    except (
        ELFError, ELFParseError, ConstructError, ValueError, KeyError, TypeError, AttributeError,
        OverflowError, AssertionError, IndexError, UnicodeError, MemoryError,
    ) as error:  # fmt: skip
        # pyelftools trusts the tables of a file; what it raises for wrong ones varies.
        raise FormatError(f"{source} is not a sound ELF file: {error}") from error
    if not isinstance(data, bytes):
        raise FormatError(f"{source} is not a kernel module: it has no .modinfo section")
    return data


def _names(names: list[str]) -> tuple[str, ...]:
    return tuple(module_name(name.strip()) for name in names if name.strip())


def _soft(lines: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules of `softdep=pre: a b post: c` lines, as (before, after)."""
    groups: dict[str, list[str]] = {"pre:": [], "post:": []}
    for line in lines:
        current: list[str] | None = None
        for word in line.split():
            if word in groups:
                current = groups[word]
            elif current is not None:
                current.append(word)
    return _names(groups["pre:"]), _names(groups["post:"])
