"""Style, scripts and pictures of the page, under addresses that change with their contents.

So a browser keeps them for ever and never shows a page with the scripts of another version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from vmlab.machine.errors import ResourceNotFound

__all__ = ["Asset", "asset", "asset_at", "asset_url"]

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAMES: Final = {
    "page.css": ("page.css",),
    "page.js": ("page.js",),
    "console.js": ("console.js",),
    "icon.svg": ("icon.svg",),
    # htmx begins as soon as it can: an extension that comes later comes too late for the page.
    "htmx.js": ("third_party/htmx.min.js", "third_party/hx-sse.min.js"),
    "xterm.js": ("third_party/xterm.js",),
    "xterm.css": ("third_party/xterm.css",),
    "xterm-fit.js": ("third_party/addon-fit.js",),
}
"""What a page may name, and the files that it is made of."""


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page's."""

    data: bytes
    media_type: str
    digest: str


@cache
def asset(name: str) -> Asset:
    """The asset of that name.

    Raises:
        ResourceNotFound: There is none.
    """
    if name not in _NAMES:
        raise ResourceNotFound(f"the page has no file {name!r}")
    folder = files("vmlab.manager.web").joinpath("assets")
    data = b"\n".join(folder.joinpath(part).read_bytes() for part in _NAMES[name])
    digest = hashlib.sha256(data).hexdigest()[:16]
    return Asset(data, _TYPES[name.rpartition(".")[2]], digest)


def asset_url(name: str) -> str:
    """Where a page finds it."""
    return f"/ui/assets/{asset(name).digest}/{name}"


def asset_at(digest: str, name: str) -> Asset:
    """The asset of an address that `asset_url` made.

    Raises:
        ResourceNotFound: There is none, or it is not what it was when the address was made.
    """
    found = asset(name)
    if found.digest != digest:
        raise ResourceNotFound(f"{name} is not what it was", hint="load the page anew")
    return found
