"""Directories of the host inside a guest: mounted by 9p or virtiofs, else copied.

The hypervisor provides the device; here the guest is told to mount it. 9p2000.L over virtio: Linux
Documentation/filesystems/9p.rst.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vmlab.guests.command import quote
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.spec import Share, ShareKind

_LOG: Final = logging.getLogger(__name__)

_OPTIONS: Final = {
    ShareKind.P9: "trans=virtio,version=9p2000.L,msize=512000",
    ShareKind.VIRTIOFS: "",
}
_MODULES: Final = {ShareKind.P9: "9pnet_virtio 9p", ShareKind.VIRTIOFS: "virtiofs"}


def parse_share(text: str, tag: str) -> Share:
    """A share from "HOST:GUEST[:ro|rw][:9p|virtiofs|copy]"; read-only if nothing is said.

    Raises:
        InvalidSpec: it is none.
    """
    source, _, rest = text.partition(":")
    target, *flags = rest.split(":")
    kinds = [flag for flag in flags if flag in set(ShareKind)]
    access = [flag for flag in flags if flag in {"ro", "rw"}]
    if not source or not target.startswith("/") or len(kinds) + len(access) != len(flags):
        raise InvalidSpec(
            [SpecProblem("--share", text, 'a directory and its place, as ".:/src" or ".:/src:rw"')],
            what="command line",
            hint="the place is an absolute path; ro or rw, 9p, virtiofs or copy may follow",
        )
    return Share(
        tag=tag,
        source=Path(source).expanduser().absolute(),
        target=target,
        readonly="rw" not in access,
        kind=ShareKind(kinds[-1]) if kinds else ShareKind.AUTO,
    )


async def mount_shares(guest: Guest, shares: Iterable[Share]) -> dict[str, ShareKind]:
    """Bring shares to their places in the guest; returns how each tag got there.

    A share of the kind `auto` that can be mounted neither way is copied, and a warning logged, if
    it is read-only; a copy that is writable is the guest's own, and nothing comes back from it.

    Raises:
        OperationFailed: it cannot be mounted the one way that it asks for.
    """
    done = {}
    for share in shares:
        done[share.tag] = await _bring(guest, share)
    return done


async def _bring(guest: Guest, share: Share) -> ShareKind:
    if share.kind is ShareKind.COPY:
        await _copy(guest, share)
        return ShareKind.COPY
    ways = [ShareKind.P9, ShareKind.VIRTIOFS] if share.kind is ShareKind.AUTO else [share.kind]
    said = []
    for way in ways:
        options = ",".join(filter(None, (_OPTIONS[way], "ro" if share.readonly else "")))
        result = await guest.execute(
            f"modprobe -a {_MODULES[way]} 2>/dev/null; mkdir -p {quote(share.target)} && "
            f"mount -t {way.value} {f'-o {options}' if options else ''} {quote(share.tag)} "
            f"{quote(share.target)}"
        )
        if result.ok:
            return way
        said.append(f"{way.value}: {result.stderr.strip()}")
    if share.kind is not ShareKind.AUTO:
        raise OperationFailed(
            f"cannot mount share {share.tag!r} at {share.target}: {'; '.join(said)}",
            hint="does the guest's kernel have it? The kind copy always works",
            machine=guest.machine.name,
        )
    if not share.readonly:
        raise OperationFailed(
            f"cannot mount share {share.tag!r} at {share.target}: {'; '.join(said)}",
            hint="a writable share cannot be copied instead: what is written would be lost",
            machine=guest.machine.name,
        )
    _LOG.warning("share %s is copied: %s", share.tag, "; ".join(said))
    await _copy(guest, share)
    return ShareKind.COPY


async def _copy(guest: Guest, share: Share) -> None:
    result = await guest.execute(
        f"if [ -d {quote(share.target)} ]; then rmdir {quote(share.target)}; fi"
    )
    if not result.ok:
        raise CommandFailed(result, "0", machine=guest.machine.name)
    await guest.copy_in(share.source, share.target)
    if share.readonly:
        # As one that is mounted: what the guest must not write to it cannot.
        await guest.succeed(
            f"mount -o bind {quote(share.target)} {quote(share.target)} && "
            f"mount -o remount,bind,ro {quote(share.target)}"
        )
