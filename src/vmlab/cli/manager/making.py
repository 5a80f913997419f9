"""``vmlab create`` and ``vmlab launch``: new machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.manager import options
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.output import JsonFlag

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import OperationDocument

__all__ = ["create", "launch"]

NameArgument = Annotated[str | None, typer.Argument(help="Its name; an own one if left out.")]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template", "-t", help="Template to start from.", autocompletion=completed("templates")
    ),
]
ImageOption = Annotated[
    str | None, typer.Option("--image", "-i", help="Image to boot; see `vmlab image list`.")
]
SpecOption = Annotated[
    Path | None,
    typer.Option("--spec", help="A machine specification (TOML or JSON): `vmlab schema machine`."),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        "-H",
        help="Hypervisor host; the preferred one if left out.",
        autocompletion=completed("hosts"),
    ),
]
CpusOption = Annotated[int | None, typer.Option("--cpus", "-c", min=1, help="Number of vCPUs.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", "-m", help='Memory, such as "512M".')]
DisksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--disk",
        help="A disk of `vmlab disk list` to attach; repeatable.",
        autocompletion=completed("disks"),
    ),
]
NetworksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        "-n",
        metavar="NETWORK[,address=...][,mac=...]",
        help='A network to be on, "user" for NAT without root; repeatable.',
        autocompletion=completed("networks"),
    ),
]
LabelsOption = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY=VALUE", help="What to find it by; repeatable."),
]
AutostartOption = Annotated[
    bool,
    typer.Option(
        "--autostart", help="Start it again when its manager begins, unless somebody stopped it."
    ),
]
FallbackOption = Annotated[
    list[str] | None,
    typer.Option("--fallback", help="Host to try when its own cannot take it; repeatable."),
]
ReleaseOption = Annotated[
    str | None,
    typer.Option(
        "--release-addresses", help='When its addresses are free again: "stop", "delete".'
    ),
]
FindingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--on",
        metavar="FINDING=POLICY",
        help="What to do about a finding: report, adopt, reconcile or quarantine; repeatable.",
    ),
]
EveryOption = Annotated[
    str | None, typer.Option("--snapshot-every", help='Take snapshots, such as every "6h".')
]
KeepOption = Annotated[
    int | None, typer.Option("--snapshot-keep", min=1, help="Scheduled snapshots that are kept.")
]
HostnameOption = Annotated[
    str | None, typer.Option("--hostname", help="The guest's name; the machine's if left out.")
]
UserDataOption = Annotated[
    Path | None, typer.Option("--user-data", help="File with cloud-init's user-data.")
]
KeysOption = Annotated[
    list[Path] | None,
    typer.Option("--ssh-key", help="File with public keys that may log in; repeatable."),
]


def _wanted(
    name: str | None,
    *,
    template: str | None,
    image: str | None,
    spec: Path | None,
    host: str | None,
    cpus: int | None,
    memory: str | None,
    disk: list[str] | None,
    network: list[str] | None,
    label: list[str] | None,
    autostart: bool,
    fallback: list[str] | None,
    release: str | None,
    findings: list[str] | None,
    snapshot_every: str | None,
    snapshot_keep: int | None,
    hostname: str | None,
    user_data: Path | None,
    ssh_key: list[Path] | None,
    start: bool,
    command: str,
) -> BaseModel:
    """The request that the options make."""
    if template is None and image is None and spec is None:
        raise options.wrong(
            command,
            name,
            "what to make it of: --image, --template or --spec",
            command=command,
        )
    return request(
        "CreateMachine",
        name=name,
        template=template,
        image=image,
        spec=None if spec is None else specification(spec),
        host=host,
        vcpus=cpus,
        memory=memory,
        disks=tuple(disk or ()),
        nics=tuple(options.nics(network, command=command)),
        labels=options.labels("--label", label, command=command),
        policy=options.policy(
            command=command,
            autostart=autostart or None,
            fallback=fallback,
            release=release,
            findings=findings,
            snapshot_every=snapshot_every,
            snapshot_keep=snapshot_keep,
        ),
        metadata=options.metadata(
            command=command, hostname=hostname, user_data=user_data, ssh_keys=ssh_key
        ),
        start=start or None,
    )


def specification(path: Path) -> dict[str, Any]:
    """A machine's specification from its file, checked.

    Raises:
        InvalidSpec: it is none.
    """
    from vmlab.machine.spec import MachineSpec

    return MachineSpec.load(path).model_dump(mode="json", exclude_unset=True)


def create(
    name: NameArgument = None,
    *,
    template: TemplateOption = None,
    image: ImageOption = None,
    spec: SpecOption = None,
    host: HostOption = None,
    cpus: CpusOption = None,
    memory: MemoryOption = None,
    disk: DisksOption = None,
    network: NetworksOption = None,
    label: LabelsOption = None,
    autostart: AutostartOption = False,
    fallback: FallbackOption = None,
    release: ReleaseOption = None,
    on: FindingsOption = None,
    snapshot_every: EveryOption = None,
    snapshot_keep: KeepOption = None,
    hostname: HostnameOption = None,
    user_data: UserDataOption = None,
    ssh_key: KeysOption = None,
    start: Annotated[bool, typer.Option("--start", help="Start it, too.")] = False,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a machine that outlives this command, from an image, a template or a specification.

    Prints its name. It is started by `vmlab start`; `vmlab launch` does both.
    """
    wanted = _wanted(
        name, template=template, image=image, spec=spec, host=host, cpus=cpus, memory=memory,
        disk=disk, network=network, label=label, autostart=autostart, fallback=fallback,
        release=release, findings=on, snapshot_every=snapshot_every, snapshot_keep=snapshot_keep,
        hostname=hostname, user_data=user_data, ssh_key=ssh_key, start=start, command="create",
    )  # fmt: skip

    def told(operation: OperationDocument) -> str:
        made = operation.target_name or operation.target or ""
        output.note(
            f"{made} runs: `vmlab shell {made}`" if start else f"next: `vmlab start {made}`"
        )
        return made

    return change([wanted], How(wait, dry_run, as_json), told)


def launch(
    name: NameArgument = None,
    *,
    template: TemplateOption = None,
    image: ImageOption = None,
    spec: SpecOption = None,
    host: HostOption = None,
    cpus: CpusOption = None,
    memory: MemoryOption = None,
    disk: DisksOption = None,
    network: NetworksOption = None,
    label: LabelsOption = None,
    autostart: AutostartOption = False,
    fallback: FallbackOption = None,
    release: ReleaseOption = None,
    on: FindingsOption = None,
    snapshot_every: EveryOption = None,
    snapshot_keep: KeepOption = None,
    hostname: HostnameOption = None,
    user_data: UserDataOption = None,
    ssh_key: KeysOption = None,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a machine, start it, and wait until its guest answers.

    Prints its name. A guest that cannot answer (a specification without an image) is not waited
    for.
    """
    wanted = _wanted(
        name, template=template, image=image, spec=spec, host=host, cpus=cpus, memory=memory,
        disk=disk, network=network, label=label, autostart=autostart, fallback=fallback,
        release=release, findings=on, snapshot_every=snapshot_every, snapshot_keep=snapshot_keep,
        hostname=hostname, user_data=user_data, ssh_key=ssh_key, start=True, command="launch",
    )  # fmt: skip

    async def answering(client: AsyncClient, operation: OperationDocument) -> None:
        machine = await client.machines.show(operation.target or operation.target_name or "")
        if machine.image is not None and not dry_run:
            await client.machines.execute(machine.id, ["true"])

    def told(operation: OperationDocument) -> str:
        made = operation.target_name or operation.target or ""
        output.note(f"{made} runs: `vmlab shell {made}`, `vmlab exec {made} -- uname -a`")
        return made

    return change([wanted], How(True, dry_run, as_json), told, after=answering)
