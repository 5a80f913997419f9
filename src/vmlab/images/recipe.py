"""Recipes: what an image is made of, as TOML.

Not how it is built: that is `vmlab.images.tiny` and `vmlab.images.roots`. The built-in recipes
are the files in recipes/, in the same form as a user's own.
"""

from __future__ import annotations

import re
from enum import StrEnum
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from vmlab.images.errors import ImageNotFound, RecipeError
from vmlab.images.tiny.modules import LAB_AVAILABLE, LAB_LATE, LAB_LOAD
from vmlab.machine.architecture import Architecture, parse_architecture
from vmlab.machine.documents import build, parse_document
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.sizes import MIB, Size
from vmlab.machine.spec import Name

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_MODULE = re.compile(r"[A-Za-z0-9_-]+\??")
_WORD = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LAB = "@lab"


class Form(StrEnum):
    """What an image consists of beside its kernel."""

    INITRAMFS = "initramfs"
    RAW = "raw"
    QCOW2 = "qcow2"


def _package(value: object) -> object:
    if not isinstance(value, str) or _PACKAGE.fullmatch(value) is None:
        raise ValueError("a Debian package's name: lower-case letters, digits, '+', '.' and '-'")
    return value


def _module(value: object) -> object:
    if not isinstance(value, str) or not (value == _LAB or _MODULE.fullmatch(value)):
        raise ValueError('a module\'s name, with "?" at its end if the kernel may lack it')
    return value


def _word(value: object) -> object:
    if not isinstance(value, str) or _WORD.fullmatch(value) is None:
        raise ValueError("lower-case letters, digits, '.' and '-'")
    return value


def _guest_path(value: object) -> object:
    if (
        not isinstance(value, str)
        or not value.startswith("/")
        or ".." in value.split("/")
        or "\0" in value
        or value.endswith("/")
    ):
        raise ValueError('an absolute path in the guest, without "..", such as "/etc/motd"')
    return str(PurePosixPath(value))


def _mode(value: object) -> object:
    if isinstance(value, str):
        try:
            value = int(value, 8)
        except ValueError:
            raise ValueError('an octal mode such as "0644"') from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 0o7777:
        raise ValueError('an octal mode such as "0644"')
    return value


def _one_line(value: object) -> object:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("text of one line")
    return value


PackageName = Annotated[str, BeforeValidator(_package)]
ModuleName = Annotated[str, BeforeValidator(_module)]
Word = Annotated[str, BeforeValidator(_word)]
GuestPath = Annotated[str, BeforeValidator(_guest_path)]
Mode = Annotated[
    int,
    BeforeValidator(_mode),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": "^[0-7]{1,5}$"}, {"type": "integer"}]}),
]
Line = Annotated[str, BeforeValidator(_one_line)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class GuestFile(_Part):
    """A file to put into the image: its text, or the file on this host that it is a copy of."""

    path: GuestPath = Field(description="absolute, in the guest; its directories are made")
    text: str | None = Field(None, description="its contents, or else:")
    source: Path | None = Field(
        None, description="the file on this host that it is a copy of, relative to the recipe's"
    )
    mode: Mode = Field(0o644, description='its permissions in octal, such as "0755"')

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if (self.text is None) == (self.source is None):
            raise ValueError("give either text or source")
        return self


class Script(_Part):
    """A shell script. "boot": run by every guest before its agent starts (tiny images).
    "build": run once, in the root that is being built."""

    name: Name = Field(description="for people, and the name of the file in the guest")
    text: str = Field(min_length=1, description="the script, for /bin/sh if it has no #!")
    when: str = Field(
        "boot", pattern="^(boot|build)$", description='"boot" or "build"; they run in their order'
    )


class Modules(_Part):
    """Kernel modules of the initramfs, with all that they depend on.

    A question mark at the end of a name: the kernel may do without. "@lab" stands for what a lab's
    guest usually needs. The drivers of devices that are there at boot are loaded by themselves, if
    they are among these.
    """

    load: tuple[ModuleName, ...] = Field((_LAB,), description="loaded first, devices or not")
    late: tuple[ModuleName, ...] = Field((_LAB,), description="loaded in the background later")
    available: tuple[ModuleName, ...] = Field((_LAB,), description="there for modprobe")

    def expanded(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """load, late and available, with "@lab" replaced by the names it stands for."""
        return (
            _expanded(self.load, LAB_LOAD),
            _expanded(self.late, LAB_LATE),
            _expanded(self.available, LAB_AVAILABLE),
        )


def _expanded(names: tuple[str, ...], lab: tuple[str, ...]) -> tuple[str, ...]:
    result: dict[str, None] = {}
    for name in names:
        result.update(dict.fromkeys(lab if name == _LAB else (name,)))
    return tuple(result)


class Recipe(_Part):
    """What an image is made of."""

    name: Name = Field(description="what the image is called in lists")
    description: Line = Field("", description="for people")
    distribution: str = Field("debian", pattern="^debian$", description="the only one so far")
    suite: Word = Field(description="suite or codename, such as bookworm")
    architecture: Annotated[Architecture, BeforeValidator(parse_architecture)] = Field(
        description="of the guest; Debian's names are understood as well"
    )
    components: tuple[Word, ...] = Field(
        ("main",), min_length=1, description="those of the archive that packages may come from"
    )
    format: Form = Field(
        Form.INITRAMFS,
        description="initramfs: everything in memory, put together by vmlab alone. raw or qcow2: "
        "a full root on a disk, installed by mmdebstrap",
    )
    size: Size | None = Field(None, description="of the disk; at least 256M, and sparse")
    kernel: PackageName = Field(
        description="the kernel's package, or one that depends on it (linux-image-amd64)"
    )
    packages: tuple[PackageName, ...] = Field(
        (),
        description="with all that they depend on; an initramfs needs busybox-static among them, "
        "and the packages' own scripts are not run",
    )
    without: tuple[PackageName, ...] = Field(
        (), description="packages that others depend on, but that an initramfs can do without"
    )
    modules: Modules = Field(Modules(), description="kernel modules of the initramfs")
    files: tuple[GuestFile, ...] = Field((), description="put into the image at the end")
    scripts: tuple[Script, ...] = Field((), description="run at boot, or once in the new root")
    cmdline: Line = Field("quiet panic=-1", description="the kernel's, besides console=")
    channels: tuple[str, ...] = Field(
        ("agent", "console"),
        min_length=1,
        description="how its guests can be talked to, the best first: agent (which is then put "
        "in), qga, ssh, console",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = ("agent", "qga", "ssh", "console")
        wrong = [channel for channel in self.channels if channel not in known]
        if wrong:
            raise ValueError(f"channels has {wrong[0]!r}, which is none of {', '.join(known)}")
        if self.format is Form.INITRAMFS:
            if self.size is not None:
                raise ValueError('size is for a disk: with format = "initramfs" leave it out')
            if any(script.when == "build" for script in self.scripts):
                raise ValueError('an initramfs is put together, not installed: when = "boot"')
        elif self.without:
            raise ValueError(
                "without is for an initramfs: on a disk every package is installed with all that "
                "it depends on"
            )
        elif self.size is None or self.size < 256 * MIB:
            raise ValueError(f'format = "{self.format}" needs a size of at least "256M"')
        return self

    @property
    def tiny(self) -> bool:
        """Whether the image is a kernel and an initramfs, without a disk."""
        return self.format is Form.INITRAMFS

    def canonical(self) -> dict[str, Any]:
        """What the image's digest is made over: all but the words for people."""
        data = self.model_dump(mode="json", exclude={"name", "description"})
        data["modules"] = [list(names) for names in self.modules.expanded()]
        for file in data["files"]:
            del file["source"]  # its contents are an input of the build, its place is not
        return data


def read(path: Path) -> Recipe:
    """The recipe in a TOML file; its files' sources are made absolute.

    Raises:
        RecipeError: it cannot be read, or a field is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"the recipe {path} cannot be read: {reason}") from error
    recipe = parse(text, source=str(path))
    files = tuple(
        file
        if file.source is None
        else file.model_copy(update={"source": path.parent / file.source})
        for file in recipe.files
    )
    return recipe.model_copy(update={"files": files})


def parse(text: str, *, source: str = "recipe") -> Recipe:
    """The recipe in a TOML text.

    Raises:
        RecipeError: with one line for each field that is wrong.
    """
    try:
        return parse_document(Recipe, text, source=source)
    except InvalidSpec as error:
        raise RecipeError(error.message, hint=_HINT) from error


def from_data(data: object, *, source: str = "recipe") -> Recipe:
    """The recipe in plain data, as TOML or JSON give it.

    Raises:
        RecipeError: with one line for each field that is wrong.
    """
    try:
        return build(Recipe, data, source=source)
    except InvalidSpec as error:
        raise RecipeError(error.message, hint=_HINT) from error


_HINT = "`vmlab image show debian-13-riscv64-tiny --recipe` prints one that is right"


def builtin_names() -> list[str]:
    """The names of the built-in recipes."""
    folder = resources.files("vmlab.images") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def builtin(name: str) -> Recipe:
    """A built-in recipe.

    Raises:
        ImageNotFound: there is none of that name.
    """
    return parse(builtin_text(name), source=f"built-in recipe {name}")


def builtin_text(name: str) -> str:
    """A built-in recipe's TOML text.

    Raises:
        ImageNotFound: there is none of that name.
    """
    names = builtin_names()
    if name not in names:
        raise ImageNotFound(f"there is no recipe {name!r}", hint="built in are " + ", ".join(names))
    return (resources.files("vmlab.images") / "recipes" / f"{name}.toml").read_text("utf-8")
