"""Directories of the host inside a guest: mounted by 9p or virtiofs, else copied.

The hypervisor provides the device; here the guest is told to mount it. 9p2000.L over virtio and
virtiofs: Linux's Documentation/filesystems/9p.rst and virtiofs.rst.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vmlab.guests.command import CommandResult, quote
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.spec import Share, ShareKind

_LOG: Final = logging.getLogger(__name__)

_OPTIONS: Final = {
    ShareKind.P9: "trans=virtio,version=9p2000.L,msize=512000",
    ShareKind.VIRTIOFS: "",
}
_WAYS: Final = (ShareKind.VIRTIOFS, ShareKind.P9)
"""The ways of a share that finds its own, the first one first."""
_NOT_MOUNTED: Final = ("not mounted", "Invalid argument", "no mount point", "No such file")
"""What umount(8) and busybox say of a place where nothing is mounted."""
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

    A share of the kind `auto` is mounted by virtiofs, else by 9p. If neither works it is copied,
    and a warning logged, if it is read-only; a copy that is writable is the guest's own, and
    nothing comes back from it.

    Raises:
        OperationFailed: it cannot be mounted the one way that it asks for, or at all.
    """
    done = {}
    for share in shares:
        done[share.tag] = await _bring(guest, share)
    return done


async def unmount_shares(guest: Guest, shares: Iterable[Share]) -> None:
    """Take shares that are mounted, or copied read-only, from their places; others are left.

    Raises:
        OperationFailed: a process of the guest's uses one.
    """
    for share in shares:
        result = await guest.execute(["umount", share.target])
        if not result.ok and not any(words in result.stderr for words in _NOT_MOUNTED):
            raise OperationFailed(
                f"cannot unmount share {share.tag!r} from {share.target}: {result.stderr.strip()}",
                hint="is it some process's working directory, or has one a file of it open?",
                machine=guest.machine.name,
            )


def _mounting(share: Share, way: ShareKind) -> str:
    """Shell text that mounts a share one way, and says which way that was."""
    options = ",".join(filter(None, (_OPTIONS[way], "ro" if share.readonly else "")))
    return (
        f"{{ modprobe -a {_MODULES[way]} 2>/dev/null; "
        f"said=$(mount -t {way.value} {f'-o {options}' if options else ''} {quote(share.tag)} "
        f"{quote(share.target)} 2>&1) && echo {way.value}; }} || "
        f'{{ echo "{way.value}: $said" >&2; false; }}'
    )


async def _bring(guest: Guest, share: Share) -> ShareKind:
    if share.kind is ShareKind.COPY:
        await _copy(guest, share)
        return ShareKind.COPY
    ways = _WAYS if share.kind is ShareKind.AUTO else (share.kind,)
    tried = " || ".join(_mounting(share, way) for way in ways)
    result = await guest.execute(f"mkdir -p {quote(share.target)} && {{ {tried}; }}")
    if result.ok:
        way = ShareKind(result.stdout.split()[-1])
        if way is not ways[0]:
            _LOG.info("share %s is mounted by %s: %s", share.tag, way.value, _said(result))
        return way
    if share.kind is not ShareKind.AUTO:
        raise OperationFailed(
            f"cannot mount share {share.tag!r} at {share.target}: {_said(result)}",
            hint="does the guest's kernel have it? The kind copy always works",
            machine=guest.machine.name,
        )
    if not share.readonly:
        raise OperationFailed(
            f"cannot mount share {share.tag!r} at {share.target}: {_said(result)}",
            hint="a writable share cannot be copied instead: what is written would be lost",
            machine=guest.machine.name,
        )
    _LOG.warning("share %s is copied: %s", share.tag, _said(result))
    await _copy(guest, share)
    return ShareKind.COPY


def _said(result: CommandResult) -> str:
    return "; ".join(result.stderr.strip().splitlines())


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
