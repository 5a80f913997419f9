"""Shares: the guest sees the files of a directory of the host's."""

from __future__ import annotations

from vmlab.conformance.bench import Bench, Skipped
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.spec import Share, ShareKind

_KINDS = {
    Capability.SHARE_9P: ShareKind.P9,
    Capability.SHARE_VIRTIOFS: ShareKind.VIRTIOFS,
    Capability.SHARE_COPY: ShareKind.COPY,
}


@check(
    "share.seen",
    clause="with each kind of share that is declared, the guest finds the directory's files, with "
    "every byte, under the target",
    means=[Means.GUEST],
)
async def seen(lab: Bench) -> None:
    kinds = [kind for capability, kind in _KINDS.items() if lab.has(capability)]
    if not kinds:
        raise Skipped("declares no kind of share")
    source = lab.directory("shared")
    contents = {"plain.txt": b"conformance\n", "deep/er/bytes.bin": bytes(range(256)) * 16}
    for name, data in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    for kind in kinds:
        share = Share(tag="conformance", source=source, target="/mnt/conformance", kind=kind)
        machine = await lab.run(shares=[share])
        await lab.guest(machine).mount_shares()
        for name, data in contents.items():
            found = await lab.guest(machine).read_file(f"{share.target}/{name}")
            lab.equal(found, data, f"{name} by {kind.value}")
        await machine.delete(force=True)
        for name, data in contents.items():
            lab.equal((source / name).read_bytes(), data, f"{name} of the host's afterwards")
